"""What compiling a UNet costs, and that one compile serves other batches and resolutions.

    python benchmarks/compile_cost.py --arch sd14

Random weights from the published configuration at full width. Own overhead is all wall time but
that of the calibration forwards, kernel cache cold, C++ compiles and weight packing of the first
step included. Peak memory is the process's, up to the end of that step.

Prints a summary and writes benchmarks/results/compile_cost_ARCH.json.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    ARCHES,
    GIB,
    RESULTS,
    arguments,
    build,
    command_line,
    example,
    folder_or_temporary,
    keep,
    machine,
    oblong,
    resident,
    run,
    timed,
)

BATCHES = (1, 2, 4)
ASPECT = (6, 10)


def main() -> None:
    """Compile, check shapes, report."""
    parser = arguments(__doc__)
    parser.add_argument("--arch", choices=[*ARCHES, "digits"], default="sd14")
    parser.add_argument("--batch", type=int, default=2, help="of the calibration calls")
    parser.add_argument("--size", type=int, help="of the sample; the configuration's by default")
    parser.add_argument("--calls", type=int, default=4, help="calibration calls")
    parser.add_argument("--recipe", default="w8a8-fast")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with folder_or_temporary(None) as cold:
        os.environ["FXQUANT_CACHE"] = str(cold)
        report = measured(options)
    show(report)
    keep(f"compile_cost_{options.arch}", report, options.results)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Compile once and measure it."""
    from fxquant import compile as fxquant_compile

    unet = build(options.arch)
    calls = [example(unet, options.batch, options.size, seed) for seed in range(options.calls)]
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    qunet, seconds = timed(lambda: fxquant_compile(unet, calls, options.recipe))
    _, first = timed(lambda: run(qunet, calls[0]))
    peak = resident("VmHWM")
    _, second = timed(lambda: run(qunet, calls[0]))
    forwards = sum(timed(partial(run, unet, call))[1] for call in calls)
    extra = max(0.0, first - second)
    return {
        "machine": machine(),
        "command": command_line(),
        "arch": options.arch,
        "sample_shape": list(calls[0]["sample"].shape),
        "recipe": options.recipe,
        "calls": options.calls,
        "fp32_weights_gib": weights / GIB,
        "fxquant_weights_gib": qunet.summary.bytes_after / GIB,
        "seconds": seconds,
        "phases": dict(qunet.summary.seconds),
        "float_forwards_seconds": forwards,
        "first_step_extra_seconds": extra,
        "own_overhead_seconds": seconds - forwards + extra,
        "peak_memory_gib": peak / GIB,
        "peak_memory_over_fp32_weights": peak / weights,
        "served_shapes": served_shapes(qunet, options.size),
        "kernels": dict(qunet.summary.kernels),
    }


def served_shapes(qunet: Any, size: int | None) -> list[list[int]]:
    """Shapes of the results of other calls; their values must be finite."""
    calls = [example(qunet, batch, size, seed=0) for batch in BATCHES]
    results = [run(qunet, call) for call in [*calls, oblong(calls[1], ASPECT)]]
    assert all(bool(x.isfinite().all()) for x in results)
    return [list(x.shape) for x in results]


def show(report: dict[str, Any]) -> None:
    """The summary."""
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["phases"].items())
    print(
        f"{report['arch']} {report['recipe']}: compile {report['seconds']:.1f} s ({phases}) with "
        f"{report['calls']} calls, {report['float_forwards_seconds']:.1f} s of float forwards; own "
        f"overhead {report['own_overhead_seconds']:.1f} s (cold cache, first step included)\n"
        f"peak memory {report['peak_memory_gib']:.2f} GiB = "
        f"{report['peak_memory_over_fp32_weights']:.2f}x the fp32 weights "
        f"({report['fp32_weights_gib']:.2f} GiB)\n"
        f"served by the one compile: {report['served_shapes']}"
    )


if __name__ == "__main__":
    main()
