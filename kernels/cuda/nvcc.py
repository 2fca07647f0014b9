"""Finds NVIDIA's compiler and the tool that shows what it made."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fxquant.kernels.jit import KernelBuildError

_SETTINGS = ("CUDACXX", "NVCC")
_PACKAGES = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm (or fxquant[cuda])"


def find() -> str | None:
    """nvcc's path: ``$CUDACXX``, ``$NVCC``, ``$CUDA_HOME/bin/nvcc``, else on ``$PATH``; or None.

    The first of the variables that is set decides.
    """
    for setting in _SETTINGS:
        if chosen := os.environ.get(setting):
            return shutil.which(chosen)
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(str(Path(home) / "bin" / "nvcc"))
    return shutil.which("nvcc")


def why_not_found() -> str:
    """The sentence for a machine where `find` finds none."""
    for setting in (*_SETTINGS, "CUDA_HOME"):
        if chosen := os.environ.get(setting):
            return f"No nvcc was found: ${setting} is {chosen!r}, which leads to no executable."
    return "No nvcc was found on $PATH: install the CUDA toolkit, or set CUDACXX to its nvcc."


def version(compiler: str) -> str:
    """``13.0.88``. Raises KernelBuildError if the program is no nvcc."""
    match = re.search(r"\bV(\d+\.\d+\.\d+)", _says(compiler))
    if not match:
        raise KernelBuildError(f"{compiler} --version tells no version of nvcc; set CUDACXX to one")
    return match[1]


def cuobjdump(library: Path, *options: str) -> str:
    """What cuobjdump tells of a library. Raises KernelBuildError if it cannot be run."""
    tool, disassembler = find_tool("cuobjdump"), find_tool("nvdisasm")
    if tool is None or disassembler is None:
        raise KernelBuildError(why_no_tools())
    path = os.pathsep.join((str(Path(disassembler).parent), os.environ.get("PATH", "")))
    command = [tool, *options, str(library)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    if done.returncode != 0:
        raise KernelBuildError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: beside nvcc, on ``$PATH``, else in NVIDIA's Python packages."""
    beside = [Path(compiler).parent for compiler in (find(),) if compiler]
    places = (*beside, None, *_packaged())
    found = (shutil.which(name if place is None else str(place / name)) for place in places)
    return next((path for path in found if path), None)


def why_no_tools() -> str:
    """The sentence for a machine where `find_tool` misses one."""
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if find_tool(tool) is None]
    return (
        f"No {' and no '.join(missing)} was found, and what nvcc compiles is only used once it has "
        f"been looked at: {_PACKAGES}."
    )


def _packaged() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("*/bin"))


@functools.cache
def _says(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout
