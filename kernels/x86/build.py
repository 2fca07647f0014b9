"""Compiles and opens the C++ beside this file, for what this CPU has and FXQUANT_CPU leaves."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fxquant.kernels import jit, machine

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
    found = machine.mask(machine.cpu_features(), os.environ.get("FXQUANT_CPU"))
    base: tuple[str, ...]
    if found >= machine.AVX512:
        base = ("-march=x86-64-v4", "-mprefer-vector-width=512")
    elif found >= machine.AVX2:
        base = ("-march=x86-64-v3",)
    else:
        return ("-march=x86-64",)
    extensions = (flag for name, flag in _EXTENSIONS.items() if name in found)
    return (*base, *(flag for flag in extensions if _is_known(flag)))


def step(row: Tensor, index: int) -> int | None:
    """The address of the quantiser's scale and zero point; None for a float output."""
    if index < 0:
        return None
    if row.dtype != torch.float32 or not row.is_contiguous() or index >= row.shape[0]:
        raise ValueError(f"quantiser {index} is not in a contiguous float32 row {row.shape}")
    return row.data_ptr() + 8 * index


@functools.cache
def _is_known(flag: str) -> bool:
    """Whether the compiler has the flag: an old one does without the instructions."""
    command = [str(jit.find_compiler()), flag, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
