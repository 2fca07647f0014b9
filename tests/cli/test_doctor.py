"""fxquant doctor: the machine as fxquant sees it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.cli import main
from fxquant.cli.doctor import would_use
from fxquant.kernels import jit, machine
from fxquant.kernels.dispatch import KERNELS
from fxquant.kernels.machine import Machine

HERE = machine.detect("cuda")
FULL_SPEED = HERE.has_vnni and HERE.arch == "x86_64" and jit.find_compiler() is not None


@pytest.fixture
def forget() -> Iterator[None]:
    """The machine is looked at anew in this test, and again after it."""
    machine.detect.cache_clear()
    yield
    machine.detect.cache_clear()


def report(capsys: pytest.CaptureFixture[str], status: int) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == status
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_the_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    told = report(capsys, 0 if FULL_SPEED else 1)
    assert told["versions"]["torch"] == torch.__version__
    assert told["cpu"]["architecture"] == HERE.arch
    assert told["cache"]["folder"] == str(jit.cache_dir())
    assert {"C++", "nvcc", "cuobjdump", "CUTLASS"} == set(told["compilers"])
    assert bool(HERE.cuda) == ("compute capability" in told["gpu"])
    assert {row["op"].partition(",")[0] for row in told["kernels"]} == set(KERNELS)
    assert bool(told["problems"]) != FULL_SPEED


@pytest.mark.usefixtures("forget")
def test_hidden_features_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXQUANT_CPU", "generic")
    told = report(capsys, 0 if FULL_SPEED else 1)
    assert told["cpu"]["features"] == "none that matters here"
    assert "hidden by FXQUANT_CPU=generic" in told["cpu"]
    if FULL_SPEED:
        assert not told["problems"], "our kernels run at every level"


@pytest.mark.usefixtures("forget")
def test_no_compiler_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "No C++ compiler was found" in " ".join(out.replace("│", " ").split())
    assert "slow: it is compiled on first use, and there is no C++ compiler: quantize," in out


def test_an_unknown_mask_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXQUANT_CPU", "sse")
    monkeypatch.setattr(machine, "detect", machine.detect.__wrapped__)
    assert main(["doctor"]) == 2
    assert "fxquant: SettingError: FXQUANT_CPU='sse'" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and allowed(path, mode))
    told = report(capsys, 0 if FULL_SPEED else 1)
    assert "set FXQUANT_CACHE" in told["cache"]["writable"]


def test_what_would_be_used_depends_on_the_machine() -> None:
    vnni = {row["op"]: row for row in would_use(Machine.named("x86-vnni"))}
    assert vnni["conv2d, int4 weights"]["kernel"] == "gemm_int4"
    assert not any(row["why_not"] for row in vnni.values())
    arm = {row["op"]: row for row in would_use(Machine.named("arm64"))}
    assert arm["conv2d, int8 weights"]["kernel"] == "reference"
    assert "compiled for x86_64, this is arm64" in arm["conv2d, int8 weights"]["why_not"][0]


def test_what_builds_gpu_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    monkeypatch.setenv("FXQUANT_CUTLASS", str(tmp_path))
    monkeypatch.setenv("CUDACXX", "no-such-program")
    gpu = dataclasses.replace(HERE, cuda="9.0")
    monkeypatch.setattr(machine, "detect", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert "No nvcc was found" in told["compilers"]["nvcc"]
    assert "name CUTLASS's include folder" in told["compilers"]["CUTLASS"]
    assert told["gpu"] == "a GPU, compute capability 9.0"
    assert told["GPU kernels"]["90a"].startswith("0 of ")
    assert told["GPU kernels"]["90"].endswith("; fxquant kernels build --arch 90a,90")
