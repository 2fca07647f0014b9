"""Compiles a source to a shared library with a plain C ABI, and keeps it.

A build is a directory ``<cache>/<name>-<key>``, or ``<name>-<architecture>-<compiler>-<key>``; the
key hashes all that the library depends on. It is made in a temporary directory, opened there, asked
for its ABI version and checked, and only then renamed into place: processes that build the same
thing at once race harmlessly. Where: ``$FXQUANT_CACHE``, else ``$XDG_CACHE_HOME/fxquant``, else
``~/.cache/fxquant``. ``FXQUANT_JIT_PRINT=1`` logs the command.

C++ is compiled on first use, by `load`; CUDA ahead of time, by fxquant.kernels.cuda.build.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxquant.errors import BackendError

logger = logging.getLogger(__name__)

_COMPILERS = ("c++", "g++", "clang++")
_LIBRARY = "library.so"
_DIGEST = "library.sha256"
_COMMAND = "command.txt"
_LINES, _WIDTH = 40, 400
_BUILD = re.compile(r"(\w+)(?:-(\w+)-([\w.]+))?-([0-9a-f]{24})")
_lock = threading.Lock()
_loaded: dict[Path, ctypes.CDLL] = {}


class KernelBuildError(BackendError):
    """A kernel's source could not be compiled, or its library not be used."""


@dataclass(frozen=True)
class Target:
    """A library to be: compiled by ``command`` (without source and output), found by its names."""

    name: str
    key: str
    source: Path
    command: tuple[str, ...]
    abi_version: int
    variant: tuple[str, str] | None = None
    """The GPU's architecture and the compiler's version, where they are part of the name."""
    check: Callable[[Path], None] | None = None
    """Looks at the library before it is kept; raises KernelBuildError."""

    @property
    def directory(self) -> Path:
        return cache_dir() / "-".join((self.name, *(self.variant or ()), self.key))


@dataclass(frozen=True)
class Build:
    """A library in the cache: of which source, compiled how; `sound` if its bytes are intact."""

    name: str
    arch: str
    """Of a GPU, as nvcc spells it (``90a``); empty for C++."""
    compiler: str
    """nvcc's version, and CUTLASS's if it was used; empty for C++, where the key holds it."""
    key: str
    command: str
    bytes: int
    sound: bool
    directory: Path


def load(source: Path, flags: Sequence[str], abi_version: int) -> ctypes.CDLL:
    """The library of the C++ file ``source``, compiled with ``flags`` unless it is cached.

    The source defines ``extern "C" int fxquant_abi_version()``, which must answer
    ``abi_version``. The flags name the CPU: no ``-march=native``, which the key cannot see through.
    Raises KernelBuildError when there is no compiler, or with the command and what it said.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelBuildError(why_no_compiler())
    files = (source, *sorted(source.parent.glob("*.h")))
    target = Target(
        name=source.stem,
        key=hashed(files, [*flags, _compiler_version(compiler), platform.machine()]),
        source=source,
        command=(compiler, "-shared", "-fPIC", *flags),
        abi_version=abi_version,
    )
    with _lock:
        if target.directory not in _loaded and not is_sound(target.directory):
            make(target)
    return opened(target.directory, abi_version)


def make(target: Target) -> None:
    """Compile a target and keep the library, in place of a damaged one.

    Raises KernelBuildError, with the command and what it said or with what the check found.
    """
    directory = target.directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="build-") as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        library = built / _LIBRARY
        _compile(target, library)
        _open(built, target.abi_version)
        if target.check:
            target.check(library)
        (built / _DIGEST).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        (built / _COMMAND).write_text(shlex.join([*target.command, target.source.name]))
        _install(built, directory, Path(scratch) / "replaced")


def opened(directory: Path, abi_version: int) -> ctypes.CDLL:
    """The library of a sound build. Raises KernelBuildError if it is another than it says."""
    with _lock:
        if directory not in _loaded:
            _loaded[directory] = _open(directory, abi_version)
        return _loaded[directory]


def hashed(files: Sequence[Path], words: Sequence[str]) -> str:
    """A key: 24 hexadecimal digits that depend on the files' bytes and on the words."""
    digest = hashlib.sha256()
    for part in (*(file.read_bytes() for file in files), *(word.encode() for word in words)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


def is_sound(directory: Path) -> bool:
    """Whether a finished, undamaged build is there.

    The bytes are checked before they are opened: a truncated library kills the process.
    """
    try:
        library = (directory / _LIBRARY).read_bytes()
        return hashlib.sha256(library).hexdigest() == (directory / _DIGEST).read_text()
    except OSError:
        return False


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
                    arch=match[2] or "",
                    compiler=match[3] or "",
                    key=match[4],
                    command=command.read_text() if command.is_file() else "",
                    bytes=sum(file.stat().st_size for file in directory.iterdir()),
                    sound=is_sound(directory),
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


def _compile(target: Target, library: Path) -> None:
    command = [*target.command, str(target.source), "-o", str(library)]
    if os.environ.get("FXQUANT_JIT_PRINT") == "1":
        logger.warning("%s", shlex.join(command))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise KernelBuildError(
            f"Compiling {target.source.name} failed.\n{shlex.join(command)}\n"
            f"{_shortened(result.stdout + result.stderr)}"
        )


def _shortened(text: str) -> str:
    """A compiler's words from its first error on; of templates it can speak megabytes."""
    lines = text.splitlines()
    first = next((k for k, line in enumerate(lines) if "error" in line), 0)
    return "\n".join(line[:_WIDTH] for line in lines[first : first + _LINES])


def _install(built: Path, directory: Path, replaced: Path) -> None:
    """Rename ``built`` to ``directory``, unless a sound build got there first."""
    if directory.exists() and not is_sound(directory):
        directory.rename(replaced)
    try:
        built.rename(directory)
    except OSError:
        if not is_sound(directory):
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
