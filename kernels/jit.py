"""Compiles a C++ file to a shared library with a plain C ABI, on first use.

A build is a directory ``<cache>/<name>-<key>`` whose key hashes the source, the headers beside it,
the flags, the compiler's version and the CPU. It is made in a temporary directory, opened there
and asked for its ABI version, and only then renamed into place: processes that build the same
thing at once race harmlessly. Where: ``$FXQUANT_CACHE``, else ``$XDG_CACHE_HOME/fxquant``, else
``~/.cache/fxquant``. ``FXQUANT_JIT_PRINT=1`` logs the command.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxquant.errors import BackendError

logger = logging.getLogger(__name__)

_COMPILERS = ("c++", "g++", "clang++")
_LIBRARY = "library.so"
_DIGEST = "library.sha256"
_COMMAND = "command.txt"
_BUILD = re.compile(r"(\w+)-([0-9a-f]{24})")
_lock = threading.Lock()
_loaded: dict[Path, ctypes.CDLL] = {}


class KernelBuildError(BackendError):
    """A kernel's source could not be compiled, or its library not be used."""


@dataclass(frozen=True)
class Build:
    """A library in the cache: of which source, compiled how; `sound` if its bytes are intact."""

    name: str
    key: str
    command: str
    bytes: int
    sound: bool
    directory: Path


def load(source: Path, flags: Sequence[str], abi_version: int, cpu: str = "") -> ctypes.CDLL:
    """The library of the C++ file ``source``, compiled with ``flags`` unless it is cached.

    The source defines ``extern "C" int fxquant_abi_version()``, which must answer
    ``abi_version``. ``cpu`` names the CPU where the flags do not (``-march=native``). Raises
    KernelBuildError when there is no compiler, or with the command and what it said.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelBuildError(why_no_compiler())
    texts = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    key = _key(texts, [*flags, _compiler_version(compiler), platform.machine(), cpu])
    directory = cache_dir() / f"{source.stem}-{key}"
    with _lock:
        if directory not in _loaded:
            if not _is_sound(directory):
                _build(source, [compiler, *flags], directory, abi_version)
            _loaded[directory] = _open(directory, abi_version)
        return _loaded[directory]


def builds() -> list[Build]:
    """What is in the cache."""
    found = []
    for directory in sorted(cache_dir().glob("*")):
        match = _BUILD.fullmatch(directory.name)
        if match and directory.is_dir():
            command = directory / _COMMAND
            found.append(
                Build(
                    name=match[1],
                    key=match[2],
                    command=command.read_text() if command.is_file() else "",
                    bytes=sum(file.stat().st_size for file in directory.iterdir()),
                    sound=_is_sound(directory),
                    directory=directory,
                )
            )
    return found


def clean() -> list[Build]:
    """Empty the cache; processes that have a library open keep it. Returns what was there."""
    found = builds()
    for build in found:
        shutil.rmtree(build.directory)
    return found


def cache_dir() -> Path:
    """Where builds are kept."""
    chosen = os.environ.get("FXQUANT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fxquant"


def find_compiler() -> str | None:
    """The path of a C++ compiler: ``$CXX``, else the first of c++, g++, clang++; or None."""
    chosen = os.environ.get("CXX")
    candidates = (chosen,) if chosen else _COMPILERS
    return next((path for name in candidates if (path := shutil.which(name))), None)


def why_no_compiler() -> str:
    """The sentence for a machine where `find_compiler` finds none."""
    chosen = os.environ.get("CXX")
    if chosen:
        return f"$CXX is {chosen!r}, which is not an executable on $PATH."
    return f"No C++ compiler was found: $CXX is unset and $PATH has no {', '.join(_COMPILERS)}."


@functools.cache
def _compiler_version(compiler: str) -> str:
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return result.stdout


def _key(texts: Sequence[bytes], words: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (*texts, *(word.encode() for word in words)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


def _is_sound(directory: Path) -> bool:
    """Whether a finished, undamaged build is there.

    The bytes are checked before they are opened: a truncated library kills the process.
    """
    try:
        library = (directory / _LIBRARY).read_bytes()
        return hashlib.sha256(library).hexdigest() == (directory / _DIGEST).read_text()
    except OSError:
        return False


def _build(source: Path, compile_: Sequence[str], directory: Path, abi_version: int) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="build-") as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        command = [*compile_, "-shared", "-fPIC", str(source), "-o", str(built / _LIBRARY)]
        if os.environ.get("FXQUANT_JIT_PRINT") == "1":
            logger.warning("%s", shlex.join(command))
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise KernelBuildError(
                f"Compiling {source.name} failed.\n{shlex.join(command)}\n{result.stderr}"
            )
        _open(built, abi_version)
        library = (built / _LIBRARY).read_bytes()
        (built / _DIGEST).write_text(hashlib.sha256(library).hexdigest())
        (built / _COMMAND).write_text(shlex.join([*compile_, source.name]))
        _install(built, directory, Path(scratch) / "replaced")


def _install(built: Path, directory: Path, replaced: Path) -> None:
    """Rename ``built`` to ``directory``, unless a sound build got there first."""
    if directory.exists() and not _is_sound(directory):
        directory.rename(replaced)
    try:
        built.rename(directory)
    except OSError:
        if not _is_sound(directory):
            raise


def _open(directory: Path, abi_version: int) -> ctypes.CDLL:
    path = directory / _LIBRARY
    try:
        library = ctypes.CDLL(str(path))
        found = library.fxquant_abi_version()
    except (OSError, AttributeError) as error:
        raise KernelBuildError(f"{path} is not a library of ours: {error}") from error
    if found != abi_version:
        raise KernelBuildError(f"{path} has ABI version {found}, this fxquant needs {abi_version}")
    return library
