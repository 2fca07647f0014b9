"""Compiles the .cu files with a C++ compiler, and lets the Python faces run them on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fxquant.kernels import jit
from fxquant.kernels.cuda import build, launch, producers, weights

HERE = Path(__file__).parent
SOURCES = Path(launch.__file__).parent
# Misaligned or overflowing code ends the program; FMAs are only where the source writes them.
FLAGS = (
    "-x", "c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
    "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
    "-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}",
)  # fmt: skip


def compiled(sources: Sequence[Path], directory: Path) -> dict[str, ctypes.CDLL]:
    """The libraries of the sources, under their stems; compiled side by side."""
    running = {}
    for source in sources:
        out = directory / f"{source.stem}.so"
        emulation = ["-include", str(HERE / "cuda_on_cpu.h")] if source.suffix == ".cu" else []
        command = [str(jit.find_compiler()), *FLAGS, *emulation, str(source), "-o", str(out)]
        running[out] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for process in running.values():
        said = process.communicate()[1]
        assert process.returncode == 0, said[-4000:]
    return {out.stem: ctypes.CDLL(str(out)) for out in running}


def play_gpu(monkeypatch: pytest.MonkeyPatch, libraries: dict[str, ctypes.CDLL]) -> None:
    """CPU tensors count as a GPU's, and the faces find these libraries."""

    def library(unit: str, device: torch.device | None = None) -> ctypes.CDLL:
        return libraries[unit]

    monkeypatch.setattr(build, "library", library)
    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "stream", lambda device: None)
    producers.library.cache_clear()
    weights.library.cache_clear()
