"""fxquant kernels: what the cache holds, filled ahead of time and emptied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxquant.cli import main
from fxquant.cli.kernels import LIBRARIES
from fxquant.kernels import jit

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
    assert "CUDA kernels do not exist yet" in out
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
    for action in ("list", "build", "clean"):
        with pytest.raises(SystemExit):
            main(["kernels", action, "--help"])
        assert f"example: fxquant kernels {action}" in capsys.readouterr().out
