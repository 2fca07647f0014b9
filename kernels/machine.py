"""What the machine can do, as a value: kernel choice is a function of it.

Tests and goldens choose for `Machine.named`, programs for what `detect` finds. ``FXQUANT_CPU``
hides features of the real CPU: ``generic``, ``avx2``, ``avx2_vnni``, ``avx512`` or ``vnni``
(AVX512 with VNNI and bfloat16).
"""

from __future__ import annotations

import functools
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from fxquant.errors import SettingError
from fxquant.kernels import jit
from fxquant.kernels.cuda import build

logger = logging.getLogger(__name__)

AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = AVX512 | {"avx512_vnni", "avx_vnni"}
LEVELS = {
    "generic": frozenset[str](),
    "avx2": AVX2,
    "avx2_vnni": AVX2 | {"avx_vnni"},
    "avx512": AVX512,
    "vnni": _VNNI | {"avx512_bf16"},
}
_ARCHES = {"amd64": "x86_64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Machine:
    """A machine as far as kernels care.

    ``arch`` is ``x86_64`` or ``arm64``; ``cpu_features`` are spelled as Linux spells them;
    ``compiler`` is the C++ compiler's path; ``cuda`` is the compute capability ("9.0") of the GPU
    that is meant, if one is, and ``cuda_kernels`` are the names of the libraries built for it.
    """

    arch: str
    cpu_features: frozenset[str]
    compiler: str | None = None
    cuda: str | None = None
    cuda_kernels: frozenset[str] = frozenset()

    @property
    def has_vnni(self) -> bool:
        """Whether u8 x s8 products are summed in int32 without saturating on the way."""
        return not self.cpu_features.isdisjoint({"avx512_vnni", "avx_vnni"})

    @staticmethod
    def named(name: str) -> Machine:
        """A fixed machine, the same everywhere: see `PRESETS`."""
        if name not in PRESETS:
            raise ValueError(f"no machine is named {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]


def _with_gpu(capability: str) -> Machine:
    """A machine with such a GPU, and every kernel built for it."""
    archs = build.loads(capability)
    names = (unit.name for arch in archs for unit in build.selected(arch))
    return Machine("x86_64", _VNNI, "c++", capability, frozenset(names))


PRESETS = {
    "x86-vnni": Machine("x86_64", _VNNI, "c++"),
    "x86-avx512": Machine("x86_64", AVX512, "c++"),
    "x86-avx2": Machine("x86_64", AVX2, "c++"),
    "x86-generic": Machine("x86_64", frozenset(), "c++"),
    "x86-vnni-no-compiler": Machine("x86_64", _VNNI),
    "arm64": Machine("arm64", frozenset(), "c++"),
    "cuda-sm80": _with_gpu("8.0"),
    "cuda-sm90": _with_gpu("9.0"),
    "cuda-sm90-no-kernels": Machine("x86_64", _VNNI, "c++", "9.0"),
}


@functools.cache
def detect(device: str = "cpu") -> Machine:
    """This machine as far as what runs on ``device`` needs to know it, looked at once.

    A GPU is looked at only if it is that device ("cuda" is the current one): merely to ask for its
    compute capability initialises CUDA, which a model on the CPU must not. Logs one notice if the
    device is the CPU and there is no C++ compiler.
    """
    compiler, capability = jit.find_compiler(), _compute_capability(device)
    if compiler is None and capability is None:
        logger.warning("%s Slower kernels are used instead.", jit.why_no_compiler())
    return Machine(
        arch=arch(),
        cpu_features=mask(cpu_features(), os.environ.get("FXQUANT_CPU")),
        compiler=compiler,
        cuda=capability,
        cuda_kernels=build.available(capability) if capability else frozenset(),
    )


def arch() -> str:
    """``x86_64``, ``arm64``, or the platform's own word for anything else."""
    machine = platform.machine().lower()
    return _ARCHES.get(machine, machine)


@functools.cache
def cpu_features() -> frozenset[str]:
    """Every feature of the CPU, unmasked."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return LEVELS.get(capability, frozenset())


def mask(features: frozenset[str], level: str | None) -> frozenset[str]:
    """The features that ``level`` (a value of ``FXQUANT_CPU``, or None for all) leaves."""
    if level is None:
        return features
    if level not in LEVELS:
        raise SettingError(f"FXQUANT_CPU={level!r} is not one of {', '.join(LEVELS)}")
    return features & LEVELS[level]


def _compute_capability(device: str) -> str | None:
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
