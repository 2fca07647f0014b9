"""Compiles the GPU's kernels ahead of time, and opens them.

Nothing of this happens on first use: 15 to 30 seconds a kernel are not to be met by surprise. A
library is found by its unit, its architecture and the hash of what it is made of; which nvcc made
it is part of its name but of no matter when it is opened, so that a machine without nvcc can use
what another built.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from fxquant.errors import near
from fxquant.kernels import jit
from fxquant.kernels.cuda import call, gate, nvcc
from fxquant.kernels.cuda.unit import ARCHES, PRODUCERS, WEIGHTS, Unit
from fxquant.kernels.cutlass import headers
from fxquant.kernels.cutlass.tiles import TILES
from fxquant.kernels.jit import KernelBuildError

UNITS = (PRODUCERS, WEIGHTS, *(tile.unit for tile in TILES))
FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "-shared", "-cudart", "static",
    "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "-s", "-Xfatbin", "-compress-all",
)  # fmt: skip
_CUTLASS_FLAGS = ("--expt-relaxed-constexpr",)

_KERNELS = Path(__file__).resolve().parents[1]
_GATE = tuple(Path(str(module.__file__)) for module in (gate, call))
"""What a library passed before it was kept: one that a laxer gate let through counts no more."""
_LOCK = "build.lock"

Say = Callable[[str], None]


def build(
    archs: Sequence[str],
    jobs: int | None = None,
    only: Sequence[str] = (),
    progress: Say = lambda line: None,
) -> list[Path]:
    """Compile and gate every unit of the architectures that is not in the cache yet.

    ``only`` keeps the units whose name contains one of its words. ``jobs`` compile at a time: one
    for each core unless it is given, and fewer while memory is short. Another build in the same
    cache is waited for. Returns the directories of all that was asked for. Raises KernelBuildError
    with every failure, after the rest has been built.
    """
    wanted = [(unit, arch) for arch in archs for unit in selected(arch, only)]
    compiler = nvcc.find()
    if compiler is None:
        raise KernelBuildError(nvcc.why_not_found())
    if nvcc.find_tool("cuobjdump") is None or nvcc.find_tool("nvdisasm") is None:
        raise KernelBuildError(nvcc.why_no_tools())
    targets = [(_target(unit, arch, compiler), unit) for unit, arch in wanted]
    try:
        with _locked(progress):
            _build_all(targets, jobs or os.cpu_count() or 1, progress)
    finally:
        _shelf.cache_clear()
    return [target.directory for target, _ in targets]


def selected(arch: str, only: Sequence[str] = ()) -> list[Unit]:
    """The units of one architecture, or those that have one of the words in their name.

    Raises KernelBuildError for an architecture or a word that fits none.
    """
    if arch not in ARCHES:
        raise KernelBuildError(f"there are no kernels for architecture {arch}.{near(arch, ARCHES)}")
    for word in only:
        if not any(word in unit.name for unit in UNITS):
            known = near(word, (unit.name for unit in UNITS))
            raise KernelBuildError(f"no unit has {word!r} in its name.{known}")
    there = [unit for unit in UNITS if arch in unit.archs]
    return [u for u in there if not only or any(word in u.name for word in only)]


def loads(capability: str) -> tuple[str, ...]:
    """The architectures whose libraries a GPU of a compute capability runs, best first.

    Machine code for x.y runs on every x.z from it on; that for 90a on 9.0 alone.
    """
    own = ["90a"] if capability == "9.0" else []
    major, minor = (int(part) for part in capability.split("."))
    fit = [a for a in ARCHES if a.isdigit() and int(a[:-1]) == major and int(a[-1]) <= minor]
    return (*own, *sorted(fit, reverse=True))


def to_build(capability: str) -> tuple[str, ...]:
    """The architectures to build for a GPU: its own, or the nearest that it runs."""
    fit = loads(capability)
    return fit if "90a" in fit else fit[:1]


def why_not(capability: str | None) -> str | None:
    """Why nothing can be built for a GPU of a compute capability; None for no GPU."""
    if capability is not None and loads(capability):
        return None
    return f"there are kernels for GPUs of 8.0 to 8.9 and 9.0, this one has {capability or 'none'}"


def command(capability: str) -> str:
    """The command line that builds all that a GPU needs."""
    return f"fxquant kernels build --arch {','.join(to_build(capability))}"


def available(capability: str) -> frozenset[str]:
    """The names of the units that a GPU of a compute capability can use now."""
    there = _shelf(jit.cache_dir())
    return frozenset(name for name, arch in there if arch in loads(capability))


def library(unit: str, device: torch.device | None = None) -> ctypes.CDLL:
    """A unit's library for a GPU (the current one unless given).

    Raises KernelBuildError, with the command that builds it, if there is none.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return opened(unit, f"{major}.{minor}")


def opened(unit: str, capability: str) -> ctypes.CDLL:
    """A unit's library for a compute capability."""
    there = _shelf(jit.cache_dir())
    for arch in loads(capability):
        if (unit, arch) in there:
            return jit.opened(there[unit, arch], _named(unit).abi_version)
    how = f"build it: {command(capability)}" if to_build(capability) else "none can be built"
    raise KernelBuildError(
        f"{jit.cache_dir()} has no library {unit} for compute capability {capability}; {how}"
    )


def built() -> list[jit.Build]:
    """The GPU libraries in the cache that are sound and made of the sources as they are now."""
    current = set(_shelf(jit.cache_dir()).values())
    return [build for build in jit.builds() if build.directory in current]


@functools.cache
def _shelf(cache: Path) -> Mapping[tuple[str, str], Path]:
    """The usable builds by unit and architecture; of several nvcc's, this machine's comes first."""
    del cache  # only keys the answer
    compiler = nvcc.find()
    mine = f"nvcc{nvcc.version(compiler)}" if compiler else ""
    keys = {(unit.name, arch): _key(unit, arch) for unit in UNITS for arch in unit.archs}
    fit = [b for b in jit.builds() if b.arch and b.sound and keys.get((b.name, b.arch)) == b.key]
    fit.sort(key=lambda b: b.compiler.split("_")[0] == mine)  # the last of equals is kept
    return {(b.name, b.arch): b.directory for b in fit}


def _named(unit: str) -> Unit:
    found = next((u for u in UNITS if u.name == unit), None)
    if found is None:
        raise KernelBuildError(f"no unit is named {unit}.{near(unit, (u.name for u in UNITS))}")
    return found


def _key(unit: Unit, arch: str) -> str:
    source, folders = _KERNELS / unit.source, ["cuda", *(["cutlass"] if unit.uses_cutlass else [])]
    beside = (f for folder in folders for f in sorted((_KERNELS / folder).glob("*.*")))
    files = [source, *_GATE, *(f for f in beside if f.suffix in {".h", ".cuh"})]
    there = [f for f in files if f.is_file()]
    return jit.hashed(
        there, (*_flags(unit, arch), repr((unit.opcodes, unit.probes)), platform.machine())
    )


def _flags(unit: Unit, arch: str) -> tuple[str, ...]:
    return (
        *FLAGS,
        *(_CUTLASS_FLAGS if unit.uses_cutlass else ()),
        *(f"-D{name}={value}" for name, value in unit.defines),
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
    )


def _check(library: Path, unit: Unit, arch: str, key: str) -> None:
    if _key(unit, arch) != key:
        raise KernelBuildError(f"{unit.name}: its sources changed while it compiled; build again")
    gate.check(library, unit, arch)


def _target(unit: Unit, arch: str, compiler: str) -> jit.Target:
    key = _key(unit, arch)
    folders, made_by = [_KERNELS / "cuda"], f"nvcc{nvcc.version(compiler)}"
    if unit.uses_cutlass:
        theirs, version = headers.includes()
        folders += [_KERNELS / "cutlass", *theirs]
        made_by += f"_cutlass{version}"
    return jit.Target(
        name=unit.name,
        key=key,
        source=_KERNELS / unit.source,
        command=(compiler, *_flags(unit, arch), *(f"-I{folder}" for folder in folders)),
        abi_version=unit.abi_version,
        variant=(arch, made_by),
        check=functools.partial(_check, unit=unit, arch=arch, key=key),
    )


def _build_all(targets: Sequence[tuple[jit.Target, Unit]], jobs: int, say: Say) -> None:
    todo = [(t, unit) for t, unit in targets if not jit.is_sound(t.directory)]
    say(f"{len(todo)} libraries to build, {len(targets) - len(todo)} there already")
    memory, failures = _Memory(_free_gibibytes()), list[str]()
    with ThreadPoolExecutor(min(jobs, max(len(todo), 1))) as pool:
        running = {pool.submit(_build_one, t, unit, memory): t for t, unit in todo}
        try:
            for count, future in enumerate(as_completed(running), 1):
                what, arch = running[future].name, (running[future].variant or ("",))[0]
                say(f"[{count}/{len(todo)}] {what} for {arch}: {_outcome(future, failures)}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise KernelBuildError(
            f"{len(failures)} of {len(todo)} libraries failed; the others are built.\n\n"
            + "\n\n".join(failures)
        )


def _build_one(target: jit.Target, unit: Unit, memory: _Memory) -> float:
    if not target.source.is_file():
        raise KernelBuildError(f"{target.name} has no source: {target.source} is not there")
    with memory.taken(unit.gibibytes):
        start = time.monotonic()
        jit.make(target)
        return time.monotonic() - start


def _outcome(future: Future[float], failures: list[str]) -> str:
    try:
        return f"built in {future.result():.1f} s"
    except KernelBuildError as error:
        failures.append(str(error))
        return "FAILED"


class _Memory:
    """Lets compilers run together only while what they take fits; one alone always may."""

    def __init__(self, gibibytes: float) -> None:
        self._free, self._users, self._changed = gibibytes, 0, threading.Condition()

    @contextlib.contextmanager
    def taken(self, gibibytes: float) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= gibibytes or self._users == 0)
            self._give(-gibibytes, 1)
        try:
            yield
        finally:
            with self._changed:
                self._give(gibibytes, -1)
                self._changed.notify_all()

    def _give(self, gibibytes: float, users: int) -> None:
        self._free, self._users = self._free + gibibytes, self._users + users


def _free_gibibytes() -> float:
    """Memory that can be had without swapping, by the machine and by this process's container."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable:"))]
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free.append(limit - int((group / "memory.current").read_text()))
    return min(free) / 2**30


@contextlib.contextmanager
def _locked(say: Say) -> Iterator[None]:
    """One build at a time in a cache; the system unlocks when a process ends, however it ends."""
    cache = jit.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another build is at work in {cache}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
