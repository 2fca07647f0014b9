"""fxquant kernels: what the cache holds, filled ahead of time and emptied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fxquant.cli import main
from fxquant.cli.kernels import LIBRARIES
from fxquant.kernels import jit, machine
from fxquant.kernels.cuda import build
from fxquant.kernels.cuda.unit import Unit
from fxquant.kernels.machine import Machine

EMPTY = hashlib.sha256(b"").hexdigest()
KERNELS = Path(__file__).parents[2] / "kernels"
needs_compiler = pytest.mark.skipif(jit.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a tiny source in place of the kernels'."""
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int fxquant_abi_version() { return 1; }\n')
    library = {"tiny.cpp": lambda: jit.load(source, ("-O1",), 1)}
    monkeypatch.setattr("fxquant.cli.kernels.LIBRARIES", library)
    return tmp_path / "cache"


def test_every_source_is_built() -> None:
    sources = {str(file.relative_to(KERNELS)) for file in KERNELS.rglob("*.cpp")}
    assert set(LIBRARIES) == sources


def test_an_empty_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "list"]) == 0
    out = capsys.readouterr().out
    assert f"no compiled kernels in {cache}; `fxquant kernels build` makes them" in out
    assert main(["kernels", "clean"]) == 0
    assert "removed 0 builds" in capsys.readouterr().out


@needs_compiler
def test_build_list_clean(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "build"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["kernels", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cache"] == str(cache)
    (build,) = told["builds"]
    assert (build["name"], build["sound"], len(build["key"])) == ("tiny", True, 24)
    assert build["command"].endswith(" -O1 tiny.cpp")
    assert build["bytes"] > (Path(build["directory"]) / "library.so").stat().st_size > 0
    (cache / "notes").mkdir()
    library = Path(build["directory"]) / "library.so"
    library.unlink()  # not truncated: this process has it open
    library.write_bytes(b"")
    assert main(["kernels", "list"]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main(["kernels", "clean"]) == 0
    assert f"removed 1 builds, 0.00 MiB, from {cache}" in capsys.readouterr().out
    assert [p.name for p in cache.iterdir()] == ["notes"]


def test_no_compiler_ends_with_2(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert main(["kernels", "build"]) == 2
    err = capsys.readouterr().err
    assert "fxquant: KernelBuildError: No C++ compiler was found" in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "build", "clean", "tune"):
        with pytest.raises(SystemExit):
            main(["kernels", action, "--help"])
        assert f"example: fxquant kernels {action}" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What building the kernels for GPUs was asked for, in place of its being done."""
    calls: list[Any] = []

    def record(archs: Sequence[str], jobs: int | None, only: Sequence[str], progress: Any) -> None:
        calls.append((list(archs), jobs, list(only)))
        progress("[1/1] producers")

    monkeypatch.setattr(build, "build", record)
    return calls


def test_kernels_for_gpus(
    cache: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--arch", "80,90a,80", "--jobs", "3", "--only", "gemm", "weights"]
    assert main(["kernels", "build", *words, "--json"]) == 0
    assert asked == [(["80", "90a"], 3, ["gemm", "weights"])]
    out, err = capsys.readouterr()
    assert json.loads(out) == {"cache": str(cache), "builds": []}, "no C++ was compiled"
    assert "[1/1] producers" in err


@needs_compiler
def test_without_arch_the_gpu_decides(
    cache: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for capability in (None, "8.9", "9.0", "12.0"):
        here = Machine("x86_64", frozenset(), "c++", capability)
        monkeypatch.setattr(machine, "detect", lambda device, here=here: here)
        assert main(["kernels", "build"]) == 0
    assert [archs for archs, _, _ in asked] == [["89"], ["90a", "90"]]


def test_what_cannot_be_built_or_tuned(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "detect", lambda device: Machine.named("x86-vnni"))
    monkeypatch.setenv("CUDACXX", "no-such-program")
    errors = {
        "build --arch 91": "KernelBuildError: there are no kernels for architecture 91",
        "build --arch 80 --only gem80": "no unit has 'gem80' in its name",
        "build --arch 80": "KernelBuildError: No nvcc was found: $CUDACXX is 'no-such-program'",
        "build --arch 80 --jobs 0": "SettingError: --jobs 0 would compile nothing",
        "build --only gemm": "SettingError: --only picks GPU kernels",
        "tune": "SettingError: tuning measures on a GPU, and PyTorch finds none here",
    }
    for command, said in errors.items():
        assert main(["kernels", *command.split()]) == 2
        assert said in capsys.readouterr().err


def test_tuning_names_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "detect", lambda device: Machine.named("cuda-sm90"))
    monkeypatch.setattr("fxquant.kernels.cutlass.tune.tune", lambda say: Path("/cache/tiles.json"))
    assert main(["kernels", "tune"]) == 0
    assert capsys.readouterr().out == "wrote /cache/tiles.json\n"
    assert main(["kernels", "tune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"table": "/cache/tiles.json"}


def test_gpu_libraries_are_listed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "UNITS", (Unit("tiny", "cuda/tiny.cu"),))
    monkeypatch.setenv("CUDACXX", "no-such-program")
    build._shelf.cache_clear()
    current = build._key(build.UNITS[0], "90a")
    for name in (f"tiny-90a-nvcc13.0.88-{current}", f"tiny-80-nvcc12.9.1-{'0' * 24}"):
        (cache / name).mkdir(parents=True)
        (cache / name / "library.so").write_bytes(b"")
        (cache / name / "library.sha256").write_text(EMPTY)
    assert main(["kernels", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["builds"]
    assert [(b["arch"], b["compiler"]) for b in told] == [
        ("80", "nvcc12.9.1"),
        ("90a", "nvcc13.0.88"),
    ]
    assert main(["kernels", "list"]) == 0
    old, new = (line for line in capsys.readouterr().out.splitlines() if "tiny" in line)
    assert "of other sources" in " ".join(old.split())
    assert "sound" in new
    build._shelf.cache_clear()
