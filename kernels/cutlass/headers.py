"""Finds CUTLASS's C++ headers, the only part of CUTLASS that is used.

``$FXQUANT_CUTLASS``, an include folder, decides if it is set; else the package ``nvidia-cutlass``,
which is looked up but never imported: its Python half does not work with CUDA 13.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from fxquant.kernels.jit import KernelBuildError

SERIES = "4.2"
"""The releases that our sources are written for."""

_INSTALL = "install fxquant[cuda], or set FXQUANT_CUTLASS to the include folder of a checkout"


def find() -> Path | None:
    """The folder that holds ``cutlass/`` and ``cute/``; None if there is none."""
    if chosen := os.environ.get("FXQUANT_CUTLASS"):
        folders = [Path(chosen)]
    else:
        spec = importlib.util.find_spec("cutlass_library")
        places = (spec and spec.submodule_search_locations) or ()
        folders = [Path(place) / "source" / "include" for place in places]
    return next((f for f in folders if (f / "cutlass" / "version.h").is_file()), None)


def why_not_found() -> str:
    """The sentence for a machine where `find` finds none."""
    chosen = os.environ.get("FXQUANT_CUTLASS")
    if chosen:
        return f"FXQUANT_CUTLASS={chosen} has no cutlass/version.h: name CUTLASS's include folder."
    return f"CUTLASS's headers were not found: {_INSTALL}."


def version(folder: Path) -> str:
    """``4.2.0``, as the headers say it."""
    text = (folder / "cutlass" / "version.h").read_text()
    parts = [
        re.search(rf"^#define CUTLASS_{part}\s+(\d+)", text, re.MULTILINE)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    return ".".join(match[1] if match else "?" for match in parts)


def includes() -> tuple[tuple[Path, ...], str]:
    """The folders to include, CUTLASS's helpers among them, and the version.

    Raises KernelBuildError if there are none of the series.
    """
    folder = find()
    if folder is None:
        raise KernelBuildError(why_not_found())
    found = version(folder)
    if not found.startswith(f"{SERIES}."):
        raise KernelBuildError(
            f"{folder} is CUTLASS {found}, the kernels are written for {SERIES}: {_INSTALL}."
        )
    folders = (folder, folder.parent / "tools" / "util" / "include")
    if not any((f / "cutlass" / "util" / "packed_stride.hpp").is_file() for f in folders):
        raise KernelBuildError(f"{folders[1]} is missing beside {folder}: {_INSTALL}.")
    return tuple(f for f in folders if f.is_dir()), found
