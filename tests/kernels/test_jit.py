"""Compiling on first use: the cache, and everything that can be wrong with it."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fxquant.errors import FxquantError
from fxquant.kernels import jit

needs_compiler = pytest.mark.skipif(jit.find_compiler() is None, reason="needs a C++ compiler")
SOURCE = """
#include "answer.h"
extern "C" int fxquant_abi_version() { return 1; }
extern "C" int answer() { return ANSWER; }
"""
IN_A_PROCESS = """
import sys
from pathlib import Path
from fxquant.kernels import jit
print(jit.load(Path(sys.argv[1]), ("-O1",), 1).answer())
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


def builds() -> list[Path]:
    """What lies in the cache, temporary directories included."""
    return sorted(jit.cache_dir().iterdir())


def start(source: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", IN_A_PROCESS, str(source)], stdout=subprocess.PIPE, text=True
    )


def answer_of(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip()


@needs_compiler
def test_a_second_load_compiles_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.load(source, ("-O1",), 1).answer() == 42
    assert [p.name.split("-")[0] for p in builds()] == ["small"]
    monkeypatch.setattr(jit, "make", None)
    jit._loaded.clear()
    assert jit.load(source, ("-O1",), 1).answer() == 42


@needs_compiler
def test_the_key_holds_source_headers_flags_and_machine(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit.load(source, ("-O1",), 1)
    jit.load(source, ("-O2",), 1)
    with monkeypatch.context() as another:
        another.setattr(platform, "machine", lambda: "another")
        jit.load(source, ("-O1",), 1)
    assert len(builds()) == 3
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    assert jit.load(source, ("-O1",), 1).answer() == 43
    source.write_text(SOURCE.replace("return ANSWER", "return ANSWER + 1"))
    assert jit.load(source, ("-O1",), 1).answer() == 44
    assert len(builds()) == 5


@needs_compiler
def test_two_processes_at_once(source: Path) -> None:
    assert [answer_of(p) for p in [start(source), start(source)]] == ["42", "42"]
    assert len(builds()) == 1


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "changed", "digest lost", "library lost"])
def test_a_damaged_build_is_made_again(source: Path, damage: str) -> None:
    assert answer_of(start(source)) == "42"
    (build,) = builds()
    library, digest = build / "library.so", build / "library.sha256"
    good = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(good[: len(good) // 2])
    elif damage == "changed":
        library.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    else:
        (digest if damage == "digest lost" else library).unlink()
    assert answer_of(start(source)) == "42"
    assert builds() == [build]
    assert jit.is_sound(build)


@needs_compiler
def test_a_source_that_does_not_compile(source: Path) -> None:
    source.write_text(SOURCE + "this is no C++")
    with pytest.raises(jit.KernelBuildError, match=r"small\.cpp failed.*\n.*-O1.*\n(.*\n)*.*error"):
        jit.load(source, ("-O1",), 1)
    assert builds() == []
    assert issubclass(jit.KernelBuildError, FxquantError)


@needs_compiler
def test_another_abi_is_refused_before_it_is_installed(source: Path) -> None:
    with pytest.raises(jit.KernelBuildError, match="ABI version 1, this fxquant needs 2"):
        jit.load(source, ("-O1",), 2)
    source.write_text('extern "C" int answer() { return 1; }')
    with pytest.raises(jit.KernelBuildError, match="not a library of ours"):
        jit.load(source, ("-O1",), 1)
    assert builds() == []


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert jit.find_compiler() is None
    assert "No C++ compiler was found" in jit.why_no_compiler()
    with pytest.raises(jit.KernelBuildError, match="No C\\+\\+ compiler was found"):
        jit.load(source, (), 1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "$CXX is 'no-such-compiler'" in jit.why_no_compiler()


@needs_compiler
def test_cxx_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "my-compiler"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert jit.find_compiler() == str(mine)


@needs_compiler
def test_the_command_is_shown_on_request(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="fxquant.kernels.jit"):
        jit.load(source, ("-O1",), 1)
        assert not caplog.records
        monkeypatch.setenv("FXQUANT_JIT_PRINT", "1")
        jit.load(source, ("-O2",), 1)
    assert "-O2" in caplog.records[0].getMessage()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXQUANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert jit.cache_dir() == Path("/somewhere/fxquant")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert jit.cache_dir() == Path.home() / ".cache" / "fxquant"
    monkeypatch.setenv("FXQUANT_CACHE", "/mine")
    assert jit.cache_dir() == Path("/mine")
