"""Compiles and opens the C++ beside this file, for what this CPU has and FXQUANT_CPU leaves."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fxquant.kernels import jit
from fxquant.kernels.machine import AVX2, AVX512, Machine, cpu_features, mask

# No -ffast-math: it would turn the division by a scale into a product and drop NaN handling.
_FLAGS = (
    "-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
_EXTENSIONS = {
    "avx_vnni": "-mavxvnni",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
}

Signatures = Mapping[str, tuple[type, ...]]


def why_not(machine: Machine) -> str | None:
    """Why nothing can be compiled for a machine."""
    if machine.arch != "x86_64":
        return f"it is compiled for x86_64, this is {machine.arch}"
    if machine.compiler is None:
        return "it is compiled on first use, and there is no C++ compiler"
    return None


def library(name: str, signatures: Signatures, abi_version: int) -> ctypes.CDLL:
    """The library of ``name``.cpp, compiled unless it is cached on disk; its functions return
    nothing and take arguments of ``signatures``."""
    loaded = jit.load(Path(__file__).with_name(f"{name}.cpp"), flags(), abi_version)
    for function, arguments in signatures.items():
        getattr(loaded, function).argtypes = arguments
        getattr(loaded, function).restype = None
    return loaded


def flags() -> tuple[str, ...]:
    """The compiler's flags: they name every instruction set, so that they also key the cache.

    FXQUANT_CXXFLAGS adds some, for sanitizers and debuggers.
    """
    return (*_FLAGS, *_for_cpu(), *shlex.split(os.environ.get("FXQUANT_CXXFLAGS", "")))


def _for_cpu() -> tuple[str, ...]:
    found = mask(cpu_features(), os.environ.get("FXQUANT_CPU"))
    base: tuple[str, ...]
    if found >= AVX512:
        base = ("-march=x86-64-v4", "-mprefer-vector-width=512")
    elif found >= AVX2:
        base = ("-march=x86-64-v3",)
    else:
        return ("-march=x86-64",)
    extensions = (flag for name, flag in _EXTENSIONS.items() if name in found)
    return (*base, *(flag for flag in extensions if _is_known(flag)))


@functools.cache
def _is_known(flag: str) -> bool:
    """Whether the compiler has the flag: an old one does without the instructions."""
    command = [str(jit.find_compiler()), flag, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
