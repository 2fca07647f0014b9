"""A saved model: its size, the time from loading it to its first step, and the memory it serves in.

    python benchmarks/load.py --arch sd14

Random weights from the published configuration at full width. Every figure comes from a process of
its own: one compiles and saves, one loads and runs three steps (twice: the first warms the cache of
compiled kernels), one runs the float32 model. Seconds from `fxquant.load` to the end of the first
step leave out importing torch and diffusers, which is given beside them. Peak memory is VmHWM: of
the whole process that loads, and of the float32 process once its model stands.

Prints a table and writes benchmarks/results/load_ARCH.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    ARCHES,
    arguments,
    ask_process,
    build,
    example,
    folder_or_temporary,
    keep,
    machine,
    reset_peak,
    resident,
    run,
    timed,
    write_json,
)

STEPS = 3
BOUNDS = {
    "size_w8a8_over_fp32": 0.262,
    "size_w4a8_over_fp32": 0.140,
    "seconds_to_first_step": 10.0,
    "memory_w8a8_over_fp32": 0.40,
}


def main() -> None:
    """Run the processes, report; exits with 1 if a bound is missed."""
    parser = arguments(__doc__)
    parser.add_argument("--arch", choices=[*ARCHES, "digits"], default="sd14")
    parser.add_argument(
        "--folder", type=Path, help="keep the saved models here, and reuse what is there"
    )
    parser.add_argument("--worker", choices=[*WORKERS], help=argparse.SUPPRESS)
    parser.add_argument("--saved", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    with folder_or_temporary(options.folder) as folder:
        report = measured(options.arch, folder)
    show(report)
    keep(f"load_{options.arch}", report)
    sys.exit(0 if all(report["within_bounds"].values()) else 1)


def measured(arch: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    saved = {}
    for recipe in ("w8a8-fast", "w4a8-fast"):
        place = folder / f"{arch}-{recipe}"
        if not (place / "save.json").exists():
            result = process("save", arch, place, recipe)
            write_json(place / "save.json", result)
        saved[recipe] = json.loads((place / "save.json").read_text())
    place = folder / f"{arch}-w8a8-fast"
    process("load", arch, place)
    loaded = process("load", arch, place)
    eager = process("eager", arch, place)
    fp32 = saved["w8a8-fast"]["fp32_bytes"]
    figures = {
        "size_w8a8_over_fp32": saved["w8a8-fast"]["saved_bytes"] / fp32,
        "size_w4a8_over_fp32": saved["w4a8-fast"]["saved_bytes"] / fp32,
        "seconds_to_first_step": loaded["load_seconds"] + loaded["step_seconds"][0],
        "memory_w8a8_over_fp32": loaded["peak_bytes"] / eager["peak_bytes"],
    }
    return {
        "arch": arch,
        "machine": loaded.pop("machine"),
        "figures": figures,
        "bounds": BOUNDS,
        "within_bounds": {k: figures[k] <= BOUNDS[k] for k in BOUNDS},
        "saved": saved,
        "loaded_w8a8": loaded,
        "fp32_eager": eager,
    }


def process(worker: str, arch: str, saved: Path, recipe: str = "") -> dict[str, Any]:
    """What a worker found out."""
    chosen = ("--worker", worker, "--arch", arch, "--saved", saved, "--recipe", recipe)
    return dict(ask_process(__file__, *chosen))


def save(options: argparse.Namespace) -> dict[str, Any]:
    """Compile with one calibration call and save."""
    import fxquant

    unet = build(options.arch)
    # A search of clipping ranges takes minutes and changes no size.
    recipe = fxquant.Recipe.parse(options.recipe).with_(weight_observer="absmax")
    qunet = fxquant.compile(unet, [example(unet, 1, None, seed=0)], recipe, progress=False)
    _, seconds = timed(lambda: qunet.save_pretrained(options.saved))
    files = {f.name: f.stat().st_size for f in Path(options.saved).iterdir()}
    return {
        "fp32_bytes": sum(p.numel() * 4 for p in unet.parameters()),
        "saved_bytes": sum(files.values()),
        "files": files,
        "save_seconds": seconds,
        "compile_seconds": dict(qunet.summary.seconds),
    }


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Load and run, in a process that did nothing before."""
    _, imports = timed(_import_everything)
    import fxquant

    others = os.getloadavg()[0]
    processor = time.process_time()
    qunet, seconds = timed(lambda: fxquant.load(options.saved))
    processor = time.process_time() - processor
    loaded = resident()
    call = example(qunet, 2, None, seed=0)
    steps = [timed(lambda: run(qunet, call))[1] for _ in range(STEPS)]
    return {
        "machine": machine(),
        "import_seconds": imports,
        "load_average_before": others,
        "load_seconds": seconds,
        "load_processor_seconds": processor,
        "phases": dict(qunet.summary.seconds),
        "step_seconds": steps,
        "resident_bytes_after_load": loaded,
        "resident_bytes": resident(),
        "peak_bytes": resident("VmHWM"),
    }


def eager(options: argparse.Namespace) -> dict[str, Any]:
    """The float32 model; its peak while it runs, not while it is built."""
    unet = build(options.arch)
    call = example(unet, 2, None, seed=0)
    reset_peak()
    steps = [timed(lambda: run(unet, call))[1] for _ in range(STEPS)]
    return {
        "sample_shape": list(call["sample"].shape),
        "step_seconds": steps,
        "resident_bytes": resident(),
        "peak_bytes": resident("VmHWM"),
    }


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "save": save,
    "load": load,
    "eager": eager,
}


def _import_everything() -> None:
    import fxquant  # noqa: F401


def show(report: dict[str, Any]) -> None:
    """The table."""
    print(f"{report['arch']}, {report['machine']['cpu']}, {report['machine']['threads']} threads")
    for name, value in report["figures"].items():
        verdict = "" if report["within_bounds"][name] else "  MISSED"
        print(f"  {name:26s} {value:8.3f}   bound {report['bounds'][name]:.3f}{verdict}")
    loaded = report["loaded_w8a8"]
    phases = ", ".join(f"{k} {v:.2f} s" for k, v in loaded["phases"].items())
    steps = ", ".join(f"{s:.2f}" for s in loaded["step_seconds"])
    print(f"  load {loaded['load_seconds']:.2f} s ({phases}); steps {steps} s")
    print(
        f"  imports {loaded['import_seconds']:.2f} s; peak {loaded['peak_bytes'] / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
