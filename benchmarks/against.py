"""One UNet step by two checkouts of fxquant, in turns: did a change cost speed, or the picture?

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before --arch sd14

Both compile the same model with the same calls, each in a process of its own, and are asked for a
step in turns. The ratio is the median, over rounds, of this checkout's time by the other's in the
same round; the errors are to the float model, on a call that neither was calibrated with.

Prints a table and writes benchmarks/results/against_ARCH.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from common import (
    HERE,
    build,
    command_line,
    example,
    keep,
    machine,
    run,
    spread,
    step_arguments,
    timed,
)
from workers import Worker, answer, take_turns

_SERVE = "--serve"
_OUTSIDE = ("passes", "kernels")  # folders of the package that lie beside it


def main() -> None:
    """Lay out, compile, take turns, report."""
    parser = step_arguments(__doc__, rounds=30, calls=3)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--recipe", default="w8a8-fast")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, help="of the latents; the configuration's by default")
    options = parser.parse_args()
    asked = {k: getattr(options, k) for k in ("arch", "recipe", "batch", "size", "calls")}
    checkouts = {"this": HERE.parent, "other": options.other.resolve()}
    with TemporaryDirectory() as folder:
        workers = {
            name: Worker(
                [str(Path(__file__).resolve()), _SERVE, str(laid_out(root, Path(folder) / name))],
                Path(folder) / f"{name}.log",
            )
            for name, root in checkouts.items()
        }
        rows = {name: worker.ask("compile", **asked) for name, worker in workers.items()}
        times, failed = take_turns(workers, options.rounds, lambda line: print(line, flush=True))
        for worker in workers.values():
            worker.close()
    if failed:
        raise SystemExit(f"not measured: {failed}")
    ratio = median(a / b for a, b in zip(times["this"], times["other"], strict=True))
    rows = {name: row | spread(times[name]) for name, row in rows.items()}
    for name, row in rows.items():
        print(name, {k: f"{v:.5g}" for k, v in row.items()})
    print(f"this checkout takes {ratio:.4f} of the other's time")
    report = {
        "machine": machine(),
        "command": command_line(),
        **asked,
        "rounds": options.rounds,
        "this_over_other": ratio,
        **rows,
    }
    keep(f"against_{options.arch}", report, options.results)


def laid_out(checkout: Path, folder: Path) -> Path:
    """A folder to import the checkout's fxquant from, links laid as if it were installed."""
    package = folder / "fxquant"
    package.mkdir(parents=True)
    for entry in (checkout / "fxquant").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in _OUTSIDE:
        (package / name).symlink_to(checkout / name)
    return folder


def serve(path: str) -> None:
    """Answer for the checkout that is laid out there."""
    sys.path.insert(0, path)
    os.environ["FXQUANT_CACHE"] = str(Path(path) / "cache")
    import torch

    import fxquant

    assert str(fxquant.__file__).startswith(path), fxquant.__file__
    held: dict[str, Any] = {}

    def compiled(
        arch: str, recipe: str, batch: int, size: int | None, calls: int
    ) -> dict[str, float]:
        unet = build(arch)
        given = [example(unet, batch, size, seed) for seed in range(calls)]
        held["call"] = example(unet, batch, size, seed=calls)
        wanted = run(unet, held["call"])
        held["model"], seconds = timed(lambda: fxquant.compile(unet, given, recipe, progress=False))
        found = run(held["model"], held["call"])
        noise = (found - wanted).square().mean()
        peak = (wanted.max() - wanted.min()).square()
        return {
            "compile_seconds": seconds,
            "relative_error": float((found - wanted).norm() / wanted.norm()),
            "psnr_db": float(10 * torch.log10(peak / noise)),
        }

    def step() -> float:
        return timed(lambda: run(held["model"], held["call"]))[1]

    answer({"compile": compiled, "step": step})


if __name__ == "__main__":
    if _SERVE in sys.argv:
        serve(sys.argv[-1])
    else:
        main()
