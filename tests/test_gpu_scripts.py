"""The scripts that measure and check on a GPU, as far as they can be without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.kernels import reference
from fxquant.kernels.cutlass import shapes, tune
from fxquant.kernels.cutlass.choose import Problem, table
from fxquant.kernels.cutlass.tiles import TILES
from tests.gpu import products, test_products_gpu

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SHELL = ("gpu_pack.sh", "gpu_check.sh")
PYTHON = ("gpu_kernels.py", "gpu_unet.py")
PARTS = [
    "install", "build", "products", "models", "kernels", "sdxl", "sd14", "producers", "refusals",
    "memcheck",
]  # fmt: skip
STUB = """#!/usr/bin/env bash
# Plays python3: notes what it is asked for, and fails or dawdles where it is told to.
echo "$*" >> "$CALLS"
case "$*" in
  *is_available*) exit "${NO_GPU:-0}" ;;
  *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  *purelib*) mkdir -p "$SITE" && echo "$SITE" ;;
esac
if [ -n "${SLOW:-}" ] && [[ "$*" == *"$SLOW"* ]]; then sleep 20; fi
if [ -n "${FAIL:-}" ] && [[ "$*" == *"$FAIL"* ]]; then echo "it went wrong" && exit 1; fi
exit 0
"""


@pytest.mark.parametrize("script", SHELL)
def test_shell_scripts_are_well_formed_and_tell_what_they_do(script: str) -> None:
    subprocess.run(["bash", "-n", BENCHMARKS / script], check=True)
    told = subprocess.run(
        ["bash", BENCHMARKS / script, "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert f"benchmarks/{script} [" in told
    assert "set -" not in told


@pytest.mark.parametrize("script", PYTHON)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_measuring_ends_with_2(script: str, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / script, "--results", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "no GPU: this measures on one, and PyTorch can use none here"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", PYTHON)
def test_help(script: str) -> None:
    command = [sys.executable, BENCHMARKS / script, "--help"]
    assert "--rounds" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


# gpu_check.sh with a python3 that does nothing


class Check:
    """Runs gpu_check.sh."""

    def __init__(self, folder: Path):
        (folder / "bin").mkdir()
        stub = folder / "bin" / "python3"
        stub.write_text(STUB)
        stub.chmod(0o755)
        self.calls, self.out, self.results = folder / "calls", folder / "out", folder / "results"
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "CALLS": str(self.calls),
            "SITE": str(folder / "site"),
            "OUT": str(self.out),
            "FXQUANT_GPU_PACK": str(folder / "pack"),
            "FXQUANT_GPU_WORK": str(folder / "work"),
            "FXQUANT_GPU_RESULTS": str(self.results),
        }

    def __call__(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", BENCHMARKS / "gpu_check.sh", *options],
            env=self.environment | environment, check=False, capture_output=True, text=True,
        )  # fmt: skip

    def asked(self, word: str) -> int:
        return self.calls.read_text().count(word)

    def state(self) -> dict[str, str]:
        lines = (self.results / "gpu_check.tsv").read_text().splitlines()
        return {line.split("\t")[0]: line.split("\t")[1] for line in lines}


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


def test_check_says_that_there_is_no_gpu(check: Check) -> None:
    done = check(NO_GPU="1")
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr


def test_check_refuses_an_unknown_part(check: Check) -> None:
    done = check("--only", "everything")
    assert done.returncode == 1
    assert "there is no part everything" in done.stderr


def test_check_runs_every_part_once(check: Check) -> None:
    done = check()
    assert done.returncode == 0, done.stdout
    assert check.state() == dict.fromkeys(PARTS, "ok")
    for file in ("products", "models", "producers", "refusals"):
        assert check.asked(f"tests/gpu/test_{file}_gpu.py") == 1
    shown = done.stdout.splitlines()
    assert [line.split()[0] for line in shown[-len(PARTS) :]] == PARTS
    assert {f.name for f in check.out.iterdir()} == {"gpu_check.tsv", "gpu_check.log"}
    again = check()
    assert again.returncode == 0
    assert check.asked("tests/gpu") == check.asked("gpu_unet") == check.asked("-m venv") == 0
    assert again.stdout.count("passed before") == len(PARTS)
    assert check("--again", "--only", "sdxl").returncode == 0
    assert check.asked("--arch sdxl") == 1
    assert check.asked("--arch sd14") == 0


def test_a_part_that_fails_stops_no_other_and_is_repeated(check: Check) -> None:
    done = check(FAIL="test_models_gpu")
    assert done.returncode == 1
    assert check.state() == dict.fromkeys(PARTS, "ok") | {"models": "failed"}
    assert re.search(r"^models +failed +\d+ +it went wrong$", done.stdout, re.MULTILINE)
    assert check().returncode == 0
    assert check.asked("tests/gpu") == 1


def test_a_part_is_stopped_at_its_limit(check: Check) -> None:
    done = check("--only", "kernels", SLOW="gpu_kernels", FXQUANT_GPU_LIMIT="1")
    assert done.returncode == 1
    assert check.state()["kernels"] == "cut"
    assert "stopped at its limit" in done.stdout


def test_what_does_not_fit_is_cut(check: Check) -> None:
    done = check("--seconds", "35")
    assert done.returncode == 1
    cut = {part for part, status in check.state().items() if status == "cut"}
    assert cut == {"models", "kernels", "sdxl", "sd14", "memcheck"}
    assert "needs 120 s" in done.stdout


# What gpu_setup.py knows


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a benchmark, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["benchmark"])

    def load(name: str) -> Any:
        return __import__(name)

    return load


def test_wheels_are_chosen(
    benchmark_module: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = benchmark_module("gpu_setup")
    setup.names()
    names = capsys.readouterr().out.split()
    assert {"diffusers", "safetensors", "pytest", "nvidia-cutlass"} <= set(names)
    assert not {"torch", "numpy", "triton"} & set(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names)
    for file in ("zipp-99.0-py3-none-any.whl", "pytest-99.0-py3-none-any.whl", "other-1.whl"):
        (tmp_path / file).touch()
    setup.PACKAGES = {"zipp": "99", "pytest": "1"}
    setup.missing(str(tmp_path))
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "zipp-99.0-py3-none-any.whl"
    ]
    assert setup.numbers("2.11.0rc1+cu130") == [2, 11, 0]
    assert setup.normal("importlib_metadata") == setup.normal("importlib-metadata")


def test_constraints_name_what_is_packed(benchmark_module: Callable[[str], Any]) -> None:
    setup = benchmark_module("gpu_setup")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {setup.normal(line.split("==")[0]) for line in lines if "==" in line}
    assert not [name for name in setup.PACKAGES if setup.normal(name) not in pinned]


# Results and tables, of made-up times


def layer(arch: str, op: str, ours: float, theirs: float, **sizes: int) -> dict[str, Any]:
    rival = {"gemm": "cuBLASLt fp16", "conv": "cuDNN fp16"}[op]
    times = {"W8A8": ours, rival: theirs}
    return {
        "arch": arch, "op": op, "count": 2, "sizes": [8, 8, 8], "operations": 2e9, **sizes,
        "systems": {name: {"microseconds": {"median": t}} for name, t in times.items()},
    }  # fmt: skip


def test_kernels_are_summed_up(
    benchmark_module: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = benchmark_module("gpu_kernels")
    layers = [
        layer("sdxl", "gemm", 10.0, 20.0), layer("sdxl", "gemm", 10.0, 5.0),
        layer("sdxl", "conv", 2.0, 6.0, kernel=3), layer("sdxl", "conv", 4.0, 4.0, kernel=1),
    ]  # fmt: skip
    found = kernels.summary(layers)["sdxl"]
    linear = found["linear"]["W8A8 / cuBLASLt fp16"]
    assert linear["geometric_mean"] == pytest.approx(1.0)
    assert linear["of_a_step"] == pytest.approx(1.25)
    assert linear["best_tops"] == pytest.approx(200.0)
    assert found["conv"]["W8A8 / cuDNN fp16"]["geometric_mean"] == pytest.approx(3**0.5)
    assert found["conv 3x3"]["W8A8 / cuDNN fp16"]["layers"] == 1
    row = {"op": "quantize", "sizes": "2x3", "microseconds": {"median": 1.0}}
    report = {
        "machine": {"gpu": "NVIDIA X"}, "summary": {"sdxl": found}, "cut": 3,
        "copy_bytes_per_second": 4e12,
        "producers": [row | {"bytes_per_second": 3e12, "of_copy": 0.75}],
    }  # fmt: skip
    kernels.show(report)
    shown = capsys.readouterr().out
    assert "times faster on NVIDIA X" in shown
    assert "cut: 3 layers" in shown
    assert "3000" in shown


def test_unet_results_are_kept_by_architecture(
    benchmark_module: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = benchmark_module("gpu_unet")
    seconds = {"median": 0.0123, "min": 0.012, "max": 0.013}
    rows = [
        {"system": "fp32 eager", "seconds": seconds, "peak_bytes": 2**31, "fallbacks": ["a: b"]},
        {"system": "fxquant W8A8", "not_measured": "it broke"},
    ]
    report = {"machine": {"gpu": "NVIDIA X"}, "sample_shape": [2, 4, 64, 64], "systems": rows}
    for arch in ("sdxl", "sd14"):
        unet.add(report | {"arch": arch}, tmp_path)
    assert set(json.loads((tmp_path / "gpu_unet.json").read_text())) == {"sdxl", "sd14"}
    capsys.readouterr()
    unet.show(report | {"arch": "sdxl"})
    shown = capsys.readouterr().out
    assert "12.30" in shown
    assert "fxquant W8A8: not measured: it broke" in shown
    assert "fp32 eager: 1 operators on a slower path" in shown


@pytest.mark.slow
def test_unet_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--arch", "digits", "--device", "cpu", "--rounds", "1", "--calls", "1"]
    systems = ["--systems", "fxquant W8A8", "--results", str(tmp_path)]
    command = [sys.executable, BENCHMARKS / "gpu_unet.py", *options, *systems]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "gpu_unet.json").read_text())["digits"]
    rows = {row["system"]: row for row in report["systems"]}
    assert rows["fxquant W8A8"]["relative_l2_to_fp32"] < 0.1
    assert rows["fxquant W8A8"]["speedup_over_fp32_eager"] > 0


# The table of tiles


def test_every_distinct_layer_is_tuned_once() -> None:
    problems = [layer.problem("f16") for layer in tune.layers()]
    assert len(set(problems)) == len(problems)
    linears = {(s.m, s.n, s.k) for rows in shapes.LINEARS.values() for s in rows}
    convs = [s for rows in shapes.CONVS.values() for s in rows]
    by_pixel = {(2 * s.size**2, s.n, s.channels) for s in convs if s.kernel == s.stride == 1}
    found = {(p.m, p.n, p.k, p.types) for p in problems if p.op == "gemm"}
    assert found == {
        *((*s, types) for s in linears for types in ("s8", "s8s4")),
        *((*s, "s8") for s in by_pixel),
    }
    assert {p.types for p in problems if p.op == "conv"} == {"s8"}
    assert all(2 <= layer.copies <= 256 for layer in tune.layers())


def test_the_fastest_tile_gets_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("gemm", "s8", "f16", 2048, 1280, 1280)
    fast, slow = "gemm_sm90a_s8_out_f16_128x128x128", "gemm_sm80_s8_128x128x64"
    rows = tune.rows_of(problem, {slow: [9.0, 8.0, 9.5], fast: [7.0, 12.0, 7.5]})
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    tune.keep(tune.tuned_path("NVIDIA X"), "NVIDIA X", rows)
    found = {p.out: tile for p, tile in table("NVIDIA X").items()}
    assert found == {"f16": fast, "bf16": fast.replace("f16", "bf16")}
    table.cache_clear()


# The GPU tests' own arithmetic, the reference playing the GPU


def test_the_pattern_is_what_a_right_kernel_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_placed", lambda tensor: tensor)
    monkeypatch.setattr(test_products_gpu, "products_of", lambda tile: reference)
    for tile in (TILES[0], next(t for t in TILES if t.is_conv)):
        test_products_gpu.test_sums_are_exact(tile)
    monkeypatch.setattr(reference, "linear", lambda **given: reference_with_a_slip(given))
    with pytest.raises(AssertionError, match="a sum is wrong"):
        test_products_gpu.test_sums_are_exact(TILES[0])


def reference_with_a_slip(given: dict[str, Any]) -> torch.Tensor:
    """One product of one output is missing, where the residual takes the sums off."""
    x = given["x"].clone()
    if given["residual"] is not None:
        x[0, 0] += 1 if x[0, 0] < 0 else -1
    return TRUE_LINEAR(**given | {"x": x})


TRUE_LINEAR = reference.linear
