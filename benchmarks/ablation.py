"""Samplers, losses and settings of EDA-DM against each other, on the bundled digits model at W4A8.

    python benchmarks/ablation.py            # everything; stop and start it as you like
    python benchmarks/ablation.py --quick    # a few tiny cells, to see that it runs

Each cell is one process: it records calibration samples with a sampler and a seed, compiles with
one recipe, draws N images from seed s and compares them with the float model's (PSNR, KID,
recognition) and with the float model's from seed s + 1 (FD ratio). Features are those of the
bundled classifier. What is finished is kept in --work and not run again.

Writes benchmarks/results/ablation_digits.json, .md and .png; a row is the mean over seeds with the
smallest and largest value.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from common import RESULTS, arguments, machine, resident, write_json

SEEDS = (0, 1, 2)
STEPS = 20  # of DDIM, to calibrate and to draw
IMAGES = 2000
SAMPLES = 256
ITERS = 200


@dataclass(frozen=True)
class Cell:
    """One row of the table; `changes` are those of the recipe's reconstruction."""

    row: str
    recipe: str = "w4a8"
    sampler: str = "tdac"
    samples: int = SAMPLES
    changes: tuple[tuple[str, Any], ...] = ()
    seeds: tuple[int, ...] = SEEDS
    images: int = IMAGES

    def file(self, work: Path, seed: int) -> Path:
        """Where its result for a seed is kept."""
        name = self.row.replace(" ", "_").replace("=", "").replace("+", "and").replace(",", "")
        return work / f"{name}_{seed}.json"


def cells() -> list[Cell]:
    """The whole table, what the paper's own tables ask first."""
    one = (0,)
    return [
        Cell("random, none", recipe="w4a8-fast", sampler="random"),
        Cell("TDAC, none", recipe="w4a8-fast"),
        trained("random, block", sampler="random", loss="block"),
        trained("random, FBR", sampler="random"),
        trained("TDAC, block", loss="block"),
        trained("TDAC, FBR"),
        trained("TDAC, layer", loss="layer"),
        trained("uniform, FBR", sampler="uniform"),
        trained("normal, FBR", sampler="normal"),
        Cell("W4A8 balanced", samples=512, seeds=one),
        Cell("W4A8 best", recipe="w4a8-best", samples=1024, seeds=one),
        Cell("W8A8 fast", recipe="w8a8-fast"),
        Cell("W8A8 balanced", recipe="w8a8", samples=512, seeds=one),
        Cell("W8A8 best", recipe="w8a8-best", samples=1024, seeds=one),
        Cell("W4A4 fast", recipe="w4a4-fast", seeds=one),
        Cell("W4A4 balanced", recipe="w4a4", samples=512, seeds=one),
        *(trained(f"TDAC lambda={v}, FBR", seeds=one, variety_weight=v) for v in (0.0, 5.0)),
        *(trained(f"TDAC, FBR gamma={v}", seeds=one, gamma=v) for v in (0.2, 2.0)),
        *(trained(f"TDAC N={n}, FBR", seeds=one, samples=n) for n in (64, 1024)),
    ]


def trained(
    row: str,
    sampler: str = "tdac",
    samples: int = SAMPLES,
    seeds: tuple[int, ...] = SEEDS,
    **changes: Any,
) -> Cell:
    """A short training, the same for every row that is compared."""
    changes = {"iters": ITERS, **changes}
    return Cell(row, "w4a8", sampler, samples, tuple(changes.items()), seeds)


def quick() -> list[Cell]:
    """A few cells in a minute: the code path, not the figures."""
    tiny = {"iters": 4, "batch": 8}
    return [
        replace(cell, samples=32, seeds=(0,), images=20,
                changes=tuple({**dict(cell.changes), **tiny}.items()) if cell.changes else ())
        for cell in cells()
        if cell.row in ("random, none", "TDAC, FBR", "random, block")
    ]  # fmt: skip


def main() -> None:
    """Run what is missing, report what there is."""
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few tiny cells; no report is kept")
    parser.add_argument("--work", type=Path, default=Path("out/ablation"), metavar="DIR")
    parser.add_argument("--minutes", type=float, help="start no cell after that many")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    table = quick() if options.quick else cells()
    work = options.work / "quick" if options.quick else options.work
    work.mkdir(parents=True, exist_ok=True)
    if options.cell:
        cell = next(c for c in table if c.row == options.cell)
        write_json(cell.file(work, options.seed), measure(cell, options.seed, work))
        return
    if not options.report:
        run_missing(table, work, options)
    rows = report(table, work)
    print(markdown(rows))
    if rows and not options.quick:
        keep(rows)


def run_missing(table: list[Cell], work: Path, options: argparse.Namespace) -> None:
    """A process per cell and seed; rows get their first seed before any gets its second."""
    jobs = [(seed, cell) for cell in table for seed in cell.seeds]
    jobs = [(seed, cell) for seed, cell in jobs if not cell.file(work, seed).exists()]
    jobs.sort(key=lambda job: job[0])
    started = time.monotonic()
    for number, (seed, cell) in enumerate(jobs):
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            print(f"{len(jobs) - number} cells are left; run again to go on", file=sys.stderr)
            return
        print(f"{number + 1}/{len(jobs)}: {cell.row}, seed {seed}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--cell", cell.row, "--seed", str(seed)]
        command += ["--work", str(options.work), *["--quick"] * options.quick]
        subprocess.run(command, check=True)


def measure(cell: Cell, seed: int, work: Path) -> dict[str, Any]:
    """Record, compile, draw, compare."""
    import fxquant
    from fxquant import assets
    from fxquant.calibration import record_selected
    from fxquant.evaluate.digits import (
        balanced_labels,
        classifier_features,
        load_digits,
        recognition_rate,
        sample_digits,
    )
    from fxquant.evaluate.distributions import kernel_inception_distance
    from fxquant.evaluate.metrics import fd_ratio, mean_psnr
    from fxquant.recipe import Recipe

    unet, scheduler = assets.load_digits_unet(), assets.load_digits_scheduler()
    recipe = Recipe.parse(cell.recipe)
    if recipe.reconstruction:
        recipe = recipe.with_(reconstruction={"samples": cell.samples, **dict(cell.changes)})
    options = dict(cell.changes)

    def run(part: int) -> object:
        labels = balanced_labels(7)[:64]
        return sample_digits(unet, scheduler, labels, steps=STEPS, seed=1000 * (seed + 1) + part)

    started = time.perf_counter()
    calls = record_selected(
        unet,
        [partial(run, part) for part in range(max(1, cell.samples // 64))],
        count=cell.samples,
        sampler=cell.sampler,
        seed=seed,
        **({"variety_weight": options["variety_weight"]} if "variety_weight" in options else {}),
    )
    recorded = time.perf_counter() - started
    qunet = fxquant.compile(unet, calls, recipe, progress=False, seed=seed)
    compiled = time.perf_counter() - started - recorded
    peak = resident("VmHWM") / 2**30
    labels = balanced_labels(cell.images // 10)

    def draw(model: Any, of: int) -> Any:
        return sample_digits(model, scheduler, labels, steps=STEPS, seed=of)

    images = draw(qunet, seed)
    exact, other = (float_images(unet, draw, s, cell.images, work) for s in (seed, seed + 1))
    features, fp_b, fp_a = (classifier_features(x) for x in (images, exact, other))
    return {
        "row": cell.row,
        "recipe": recipe.to_json(),
        "sampler": calls.selection.sampler,
        "counts": calls.selection.counts.tolist(),
        "seed": seed,
        "images": cell.images,
        "psnr": mean_psnr(images, exact),
        "fd_ratio": fd_ratio(features, fp_b, fp_a).ratio,
        "kid": kernel_inception_distance(features, classifier_features(load_digits()[0])),
        "kid_float": kernel_inception_distance(fp_b, classifier_features(load_digits()[0])),
        "recognition": recognition_rate(images, labels),
        "recognition_float": recognition_rate(exact, labels),
        "record_seconds": recorded,
        "compile_seconds": compiled,
        "peak_gib": peak,
        "settled": min((u.settled for u in qunet.summary.units), default=None),
        "machine": machine(),
    }


def float_images(unet: Any, draw: Any, seed: int, count: int, work: Path) -> Any:
    """The float model's images, kept for the cells to come."""
    from safetensors.torch import load_file, save_file

    file = work / f"float_{seed}_{count}.safetensors"
    if not file.exists():
        beside = file.with_suffix(".part")
        save_file({"images": draw(unet, seed)}, beside)
        beside.replace(file)
    return load_file(file)["images"]


def report(table: list[Cell], work: Path) -> list[dict[str, Any]]:
    """One row for every cell with a result: mean, smallest, largest over its seeds."""
    rows = []
    for cell in table:
        files = [cell.file(work, seed) for seed in cell.seeds]
        found = [json.loads(f.read_text()) for f in files if f.exists()]
        if found:
            figures = {k: spread([f[k] for f in found]) for k in FIGURES}
            rows.append({"row": cell.row, "seeds": len(found), **figures, "cells": found})
    return rows


FIGURES = {
    "psnr": "PSNR to FP, dB",
    "fd_ratio": "FD ratio",
    "kid": "KID to real",
    "recognition": "recognised",
    "compile_seconds": "compile, s",
    "peak_gib": "peak, GiB",
}


def spread(values: list[float]) -> dict[str, float]:
    """Mean, smallest and largest."""
    return {"mean": mean(values), "min": min(values), "max": max(values)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| samples, loss | seeds | " + " | ".join(FIGURES.values()) + " |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    digits = {"psnr": 2, "fd_ratio": 3, "kid": 5, "recognition": 4, "compile_seconds": 0}
    for row in rows:
        entries = []
        for key in FIGURES:
            f, n = row[key], digits.get(key, 2)
            text = f"{f['mean']:.{n}f}"
            if row["seeds"] > 1 and key in ("psnr", "fd_ratio", "kid"):
                text += f" ({f['min']:.{n}f} to {f['max']:.{n}f})"
            entries.append(text)
        lines.append(f"| {row['row']} | {row['seeds']} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def keep(rows: list[dict[str, Any]]) -> None:
    """JSON, Markdown and a chart beside the other results."""
    write_json(RESULTS / "ablation_digits.json", rows)
    first = rows[0]["cells"][0]
    head = (
        f"`python benchmarks/ablation.py`: digits model, DDIM {STEPS} steps, N = "
        f"{first['images']:,} images, features of the bundled classifier. Rows that name a loss: "
        f"W4A8, {SAMPLES} samples, {ITERS} iterations a unit, unless they say otherwise. "
        f"{first['machine']}\n\n"
    )
    (RESULTS / "ablation_digits.md").write_text(head + markdown(rows) + "\n")
    chart(rows, RESULTS / "ablation_digits.png")


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR of every row, with its spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for k, row in enumerate(reversed(rows)):
        f = row["psnr"]
        axes.plot([f["min"], f["max"]], [k, k], color="grey")
        axes.plot(f["mean"], k, "o", color="C0")
    axes.set_yticks(range(len(rows)), [r["row"] for r in reversed(rows)], fontsize=8)
    axes.set_xlabel("PSNR to the float model, dB: mean and range over seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
