"""Build, list and remove compiled kernels, or measure which serve this GPU best.

C++ kernels are compiled at their first use otherwise, kernels for a GPU never: they take minutes,
an nvcc and the packages of fxquant[cuda], but no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fxquant.cli.output import mib, show_json, show_table
from fxquant.errors import SettingError
from fxquant.kernels import jit, machine
from fxquant.kernels.cuda import build as cuda
from fxquant.kernels.cuda.unit import ARCHES
from fxquant.kernels.jit import Build
from fxquant.kernels.x86 import attention, gemm, producers

EXAMPLE = "fxquant kernels build --arch 80,90a"

# Every C++ file below kernels/, and what loads its library, compiling it if need be.
LIBRARIES: dict[str, Callable[[], object]] = {
    "x86/attention.cpp": attention.library,
    "x86/gemm.cpp": gemm.library,
    "x86/producers.cpp": producers.library,
}
_ACTIONS = {
    "list": "what the cache holds",
    "build": "compile the C++ kernels for this CPU and, where there is a GPU, its kernels; with "
    "--arch, the kernels for GPUs of those architectures",
    "clean": "empty the cache",
    "tune": "measure the GPU's kernels on the sizes of diffusion models, and use the fastest",
}


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, text in _ACTIONS.items():
        sub = actions.add_parser(
            action, help=text, description=text, epilog=f"example: fxquant kernels {action}"
        )
        sub.add_argument("--json", action="store_true", help="one JSON object instead of text")
        if action == "build":
            _configure_build(sub)


def _configure_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", help=f"architectures of GPUs, of {', '.join(ARCHES)}; separated by commas"
    )
    parser.add_argument(
        "--jobs", type=int, help="GPU kernels to compile at a time; without it, one for each core"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        help="only GPU kernels that have one of these in their name",
    )


def run(options: argparse.Namespace) -> int:
    if options.action == "tune":
        return _tune(options)
    if options.action == "build":
        _build(options)
    builds = jit.clean() if options.action == "clean" else jit.builds()
    if options.json:
        show_json({"cache": str(jit.cache_dir()), "builds": [_plain(b) for b in builds]})
    elif options.action == "clean":
        size = mib(sum(b.bytes for b in builds))
        print(f"removed {len(builds)} builds, {size}, from {jit.cache_dir()}")
    elif builds:
        _show(builds)
    else:
        print(f"no compiled kernels in {jit.cache_dir()}; `fxquant kernels build` makes them")
    return 0


def _build(options: argparse.Namespace) -> None:
    if options.jobs is not None and options.jobs < 1:
        raise SettingError(f"--jobs {options.jobs} would compile nothing; give 1 or more")
    archs: Sequence[str]
    if options.arch:
        archs = list(dict.fromkeys(word.strip() for word in options.arch.split(",")))
    else:
        capability = machine.detect("cuda").cuda
        archs = cuda.to_build(capability) if capability else ()
        for library in LIBRARIES.values() if not options.only else ():
            library()
    if archs:
        cuda.build(archs, options.jobs, options.only, progress=_say)
    elif options.only:
        raise SettingError("--only picks GPU kernels, and there is no GPU here: give --arch too")


def _tune(options: argparse.Namespace) -> int:
    if machine.detect("cuda").cuda is None:
        raise SettingError("tuning measures on a GPU, and PyTorch finds none here")
    from fxquant.kernels.cutlass.tune import tune

    table = tune(_say)
    if options.json:
        show_json({"table": str(table)})
    else:
        print(f"wrote {table}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(builds: Sequence[Build]) -> None:
    size = mib(sum(b.bytes for b in builds))
    usable = {build.directory for build in cuda.built()}
    show_table(
        f"compiled kernels in {jit.cache_dir()}, {size}",
        ("source", "for", "key", "state", "made by", "size"),
        [
            (b.name, b.arch or "CPU", b.key, _state(b, usable), _made_by(b), mib(b.bytes))
            for b in builds
        ],
        left=5,
    )


def _plain(build: Build) -> dict[str, Any]:
    return {**asdict(build), "directory": str(build.directory)}


def _state(build: Build, usable: set[Path]) -> str:
    if not build.sound:
        return "damaged, made again at its next " + ("build" if build.arch else "use")
    outdated = build.arch and build.directory not in usable and not _has_twin(build, usable)
    return "of other sources" if outdated else "sound"


def _has_twin(build: Build, usable: set[Path]) -> bool:
    """Whether the same library by another nvcc is the one in use."""
    start, end = f"{build.name}-{build.arch}-", f"-{build.key}"
    return any(d.name.startswith(start) and d.name.endswith(end) for d in usable)


def _made_by(build: Build) -> str:
    return build.compiler.replace("_", ", ") or build.command or "unknown"
