"""Time and memory of a step against batch, resolution and threads: fxquant and bf16 eager.

    python benchmarks/scaling.py --arch sd14 --folder out/scaling
    python benchmarks/scaling.py --quick     # a few small points, to see that it runs

Random weights from the published configuration at full width. One compile, at batch 2 and the
configuration's resolution, serves every point. At a point both systems have a fresh process each
and take turns; peak memory is the most after the first step, so that it is the point's own.

Prints a table and writes benchmarks/results/scaling_ARCH.json and .png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import (
    GIB,
    command_line,
    folder_or_temporary,
    keep,
    machine,
    show_table,
    step_arguments,
)
from cpu_unet import Bench
from served import Settings
from systems import BF16, SYSTEMS

BATCH = 2
AXES = {"batch": "batch", "size": "height and width of the sample", "threads": "threads"}


@dataclass(frozen=True)
class Point:
    """A step to measure."""

    batch: int
    size: int
    threads: int


def main() -> None:
    """Measure every point, report."""
    options = parsed()
    base = Point(BATCH, sample_size(options.arch), max(options.threads))
    table = [*points(base, options.batches, options.sizes, options.threads)]
    with folder_or_temporary(options.folder) as folder:
        rows = [measured(point, options, base, str(folder)) for point in table]
    report = {
        "machine": machine(),
        "command": command_line(),
        "arch": options.arch,
        "base": asdict(base),
        "rounds": options.rounds,
        "points": rows,
    }
    show(report)
    name = f"scaling_{options.arch}"
    keep(name, report, options.results)
    chart(report, options.results / f"{name}.png")


def parsed() -> argparse.Namespace:
    """The options; --quick replaces what makes a run long."""
    parser = step_arguments(__doc__, rounds=3, calls=2)
    parser.add_argument("--system", choices=[*SYSTEMS], default="fxquant W8A8")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="digits, two points")
    options = parser.parse_args()
    if options.quick:
        options.arch, options.rounds, options.calls = "digits", 2, 1
        options.batches, options.sizes, options.threads = [2, 4], [16], [1]
    return options


def sample_size(arch: str) -> int:
    """Height and width in the configuration."""
    from common import outline

    config: Any = outline(arch)[0].config
    return int(config.sample_size)


def points(
    base: Point, batches: list[int], sizes: list[int], threads: list[int]
) -> Iterator[Point]:
    """The base, then one axis at a time."""
    yield base
    yield from (replace(base, batch=b) for b in batches if b != base.batch)
    yield from (replace(base, size=s) for s in sizes if s != base.size)
    yield from (replace(base, threads=t) for t in threads if t != base.threads)


def measured(point: Point, options: argparse.Namespace, base: Point, folder: str) -> dict[str, Any]:
    """Both systems' figures."""
    settings = Settings(
        options.arch,
        point.batch,
        point.size,
        options.calls,
        point.threads,
        folder,
        prepared=(base.batch, base.size),
    )
    bench = Bench(settings, options.rounds, options.memory * GIB)
    return {**asdict(point), "systems": bench.measure([BF16, options.system])}


def show(report: dict[str, Any]) -> None:
    """The table."""
    systems = [row["system"] for row in report["points"][0]["systems"]]
    headers = [f"{name}, {unit}" for name in systems for unit in ("s", "GiB")]
    base = report["base"]
    show_table(
        f"{report['arch']}: a step, around {base}",
        ("batch x size, threads", *headers, "speed-up"),
        [_cells(point) for point in report["points"]],
    )


def _cells(point: dict[str, Any]) -> tuple[str, ...]:
    figures = [text for row in point["systems"] for text in _figures(row)]
    ratio = point["systems"][-1].get("speedup_over_bf16_eager")
    name = f"{point['batch']} x {point['size']}, {point['threads']}"
    return (name, *figures, f"{ratio:.2f}" if ratio else "")


def _figures(row: dict[str, Any]) -> tuple[str, str]:
    if "seconds" not in row:
        return "-", row["not_measured"][:30]
    return f"{row['seconds']['median']:.3f}", f"{row['steps_peak_bytes'] / GIB:.2f}"


def chart(report: dict[str, Any], path: Path) -> None:
    """Seconds above, peak memory below, a column for every axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharex="col")
    for column, (axis, label) in enumerate(AXES.items()):
        for name in (row["system"] for row in report["points"][0]["systems"]):
            line = along(report, axis, name)
            for axes, part in zip(grid[:, column], (1, 2), strict=True):
                axes.plot([p[0] for p in line], [p[part] for p in line], "o-", label=name)
                axes.set_ylim(bottom=0)
                axes.grid(alpha=0.3)
                axes.set_xticks([p[0] for p in line])
        grid[1, column].set_xlabel(label)
    grid[0, 0].set_ylabel("seconds a step, median")
    grid[1, 0].set_ylabel("peak memory of a step, GiB")
    grid[0, 0].legend()
    base = report["base"]
    figure.suptitle(
        f"{report['arch']} around batch {base['batch']}, {base['size']} x {base['size']}, "
        f"{base['threads']} threads, {report['machine']['cpu']}"
    )
    figure.savefig(path, dpi=120)


def along(report: dict[str, Any], axis: str, system: str) -> list[tuple[int, float, float]]:
    """(value, seconds, GiB) of the points that differ from the base on this axis alone."""
    others = [a for a in AXES if a != axis]
    return sorted(
        (point[axis], row["seconds"]["median"], row["steps_peak_bytes"] / GIB)
        for point in report["points"]
        for row in point["systems"]
        if all(point[a] == report["base"][a] for a in others)
        and row["system"] == system
        and "seconds" in row
    )


if __name__ == "__main__":
    main()
