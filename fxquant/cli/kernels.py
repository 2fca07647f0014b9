"""List the compiled kernels in the cache, build all of them now, or empty the cache.

C++ kernels are compiled at their first use otherwise. CUDA kernels do not exist yet: on a GPU
machine the CPU kernels serve.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fxquant.cli.output import mib, show_json, show_table
from fxquant.kernels import jit
from fxquant.kernels.jit import Build
from fxquant.kernels.x86 import attention, gemm, producers

EXAMPLE = "fxquant kernels build"
NO_CUDA = "CUDA kernels do not exist yet; the CPU kernels serve."

# Every C++ file below kernels/, and what loads its library, compiling it if need be.
LIBRARIES: dict[str, Callable[[], object]] = {
    "x86/attention.cpp": attention.library,
    "x86/gemm.cpp": gemm.library,
    "x86/producers.cpp": producers.library,
}
_ACTIONS = {
    "list": "what the cache holds",
    "build": "compile every C++ kernel for this machine",
    "clean": "empty the cache",
}


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, text in _ACTIONS.items():
        sub = actions.add_parser(
            action, help=text, description=text, epilog=f"example: fxquant kernels {action}"
        )
        sub.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
    if options.action == "build":
        for library in LIBRARIES.values():
            library()
    builds = jit.clean() if options.action == "clean" else jit.builds()
    if options.json:
        show_json({"cache": str(jit.cache_dir()), "builds": [_plain(b) for b in builds]})
        return 0
    size = mib(sum(b.bytes for b in builds))
    if options.action == "clean":
        print(f"removed {len(builds)} builds, {size}, from {jit.cache_dir()}")
        return 0
    if builds:
        rows = [(b.name, b.key, _state(b), b.command or "unknown", mib(b.bytes)) for b in builds]
        show_table(
            f"compiled kernels in {jit.cache_dir()}, {size}",
            ("source", "key", "state", "command", "size"),
            rows,
            left=4,
        )
    else:
        print(f"no compiled kernels in {jit.cache_dir()}; `fxquant kernels build` makes them")
    print(NO_CUDA)
    return 0


def _plain(build: Build) -> dict[str, Any]:
    return {**asdict(build), "directory": str(build.directory)}


def _state(build: Build) -> str:
    return "sound" if build.sound else "damaged, made again at its next use"
