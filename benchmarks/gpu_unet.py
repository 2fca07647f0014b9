"""One UNet step on a GPU: PyTorch eager and compiled, torchao and fxquant.

    python benchmarks/gpu_unet.py --arch sdxl --budget 400

Random weights from the published configuration at full width: time and memory do not depend on
training. Every system has a process of its own and draws the same weights; all see the same inputs.
Those that only load are loaded side by side, those that choose kernels by timing them one after
another with the GPU to themselves; then all take turns, in one run. A batch of 2 is one image with
guidance: SD 1.x at 64x64 latents, SDXL at 128x128.

fp32, fp16 eager: as diffusers runs it, channels_last, cudnn.benchmark, PyTorch's defaults for TF32
fp16 torch.compile: mode max-autotune, channels_last, CUDA graphs
torchao int8: its dynamic quantisation of linears, compiled like the above
fxquant: compiled on the GPU with --calls calibration calls; CUDA graphs
peak: the most memory that PyTorch reserved after loading and compiling
L2 error: relative, to fp32 without TF32

Prints a table last, and writes benchmarks/results/gpu_unet.json. Exits with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    ARCHES,
    GIB,
    HERE,
    RESULTS,
    arguments,
    command_line,
    folder_or_temporary,
    keep,
    show_table,
    spread,
)
from gpu_common import gpu, need_gpu
from gpu_systems import FP32, SYSTEMS, Settings, check_installed
from systems import slug
from workers import NotMeasured, Worker, take_turns

Report = dict[str, Any]
COMPILED = "fp16 torch.compile"
_NAME = "gpu_unet"
_FOR_ROUNDS = 25.0  # seconds kept for measuring what was loaded


def main() -> None:
    """Measure each architecture, keep it, and show all at the end."""
    options = parsed()
    if options.device == "cuda":
        need_gpu()
    reports = []
    for arch in options.arch:
        settings = Settings(arch, options.batch, options.size, options.calls, options.device)
        with folder_or_temporary(options.folder) as folder:
            budget = options.budget or float("inf")
            bench = Bench(settings, options.rounds, folder, time.monotonic() + budget)
            rows = bench.measure(options.systems)
        report = {
            "machine": gpu() if options.device == "cuda" else {},
            "command": command_line(),
            "arch": arch,
            "batch": options.batch,
            "sample_shape": bench.shape,
            "calibration_calls": options.calls,
            "rounds": options.rounds,
            "systems": rows,
        }
        reports.append(report)
        add(report, options.results)
    for report in reports:
        show(report)


def parsed() -> argparse.Namespace:
    """The options; fp32 eager is always among the systems, as the others' truth."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--arch", nargs="+", choices=[*ARCHES, "digits"], default=["sdxl", "sd14"], metavar="NAME",
        help=f"of: {', '.join(ARCHES)}, digits; default sdxl sd14",
    )  # fmt: skip
    parser.add_argument(
        "--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], metavar="NAME",
        help=f"of: {', '.join(SYSTEMS)}",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--size", type=int, help="of the latents; the config's by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=2, help="calibration calls")
    parser.add_argument(
        "--budget", type=float, help="seconds for an architecture; what is not ready then is left"
    )
    parser.add_argument("--folder", type=Path, help="keep logs and outputs here")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.systems = [n for n in SYSTEMS if n in {FP32, *options.systems}]
    return options


class TimedWorker(Worker):
    """A worker that is ended when time is up."""

    deadline = float("inf")

    def _check_memory(self) -> None:
        """Called every half second of waiting."""
        if time.monotonic() > self.deadline:
            self.close()
            raise NotMeasured("not ready in the time that there was")


class Bench:
    """Measures systems on one kind of step, until ``end`` of time.monotonic()."""

    def __init__(self, settings: Settings, rounds: int, folder: Path, end: float):
        self.settings, self.rounds, self.folder, self.end = settings, rounds, folder, end
        self.shape: list[int] = []
        self._alive: dict[str, Worker] = {}
        self._rows: dict[str, Report] = {}

    def measure(self, names: list[str]) -> list[Report]:
        """A row for every system: its figures, or why there are none."""
        self._rows = {name: {"system": name} for name in names}
        together = [n for n in names if not SYSTEMS[n].alone]
        with ThreadPoolExecutor(max(1, len(together))) as pool:
            list(pool.map(self._open, together))
        for name in names:
            if SYSTEMS[name].alone:
                self._open(name)
        try:
            self._take_turns()
        finally:
            for worker in self._alive.values():
                worker.close()
        self._compare()
        return list(self._rows.values())

    def _open(self, name: str) -> None:
        """Load it and take its first steps."""
        with self._reporting(name):
            check_installed(name)
            deadline = self.end - _FOR_ROUNDS
            if time.monotonic() > deadline:
                raise NotMeasured("no time was left to load it")
            note(f"loading {name}")
            worker = TimedWorker([str(HERE / "gpu_systems.py")], self.folder / f"{slug(name)}.log")
            worker.deadline = deadline
            try:
                facts, seconds = timed_ask(worker, name, self.settings)
            except BaseException:
                worker.close()
                raise
            note(f"{name} is ready after {seconds:.0f} s")
            worker.deadline = self.end
            self._alive[name] = worker
            self._rows[name] |= {"ready_seconds": seconds, **facts}

    def _take_turns(self) -> None:
        order = [name for name in self._rows if name in self._alive]
        times, failed = take_turns({n: self._alive[n] for n in order}, self.rounds, note)
        for name in order:
            with self._reporting(name):
                if name in failed:
                    raise NotMeasured(failed[name])
                worker, row = self._alive[name], self._rows[name]
                row["seconds"] = spread(times[name])
                row["rounds_seconds"] = times[name]
                row["peak_bytes"] = worker.ask("memory")
                self.shape = worker.ask("output", file=str(self._output(name)))

    def _compare(self) -> None:
        """Relative L2 error to float32, of the same input; speed over the others."""
        rows = {n: r for n, r in self._rows.items() if "seconds" in r}
        for other in (FP32, COMPILED):
            for row in rows.values() if other in rows else ():
                ratio = rows[other]["seconds"]["median"] / row["seconds"]["median"]
                row[f"speedup_over_{slug(other).replace('-', '_')}"] = ratio
        if FP32 not in rows:
            return
        truth = np.load(self._output(FP32)).astype(np.float64)
        for name, row in rows.items():
            error = np.load(self._output(name)) - truth
            row["relative_l2_to_fp32"] = float(np.linalg.norm(error) / np.linalg.norm(truth))

    def _output(self, name: str) -> Path:
        return self.folder / f"{slug(name)}.npy"

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        """What cannot be measured becomes a row that says why, and what is known of it."""
        try:
            yield
        except NotMeasured as error:
            note(f"{name}: not measured: {error}")
            self._rows[name] = {**self._rows[name], "not_measured": str(error)}
            self._rows[name].pop("seconds", None)


def timed_ask(worker: Worker, name: str, settings: Settings) -> tuple[Report, float]:
    """What loading a system tells, and how long it took."""
    started = time.monotonic()
    facts: Report = worker.ask("load", name=name, settings=asdict(settings))
    return facts, time.monotonic() - started


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def add(report: Report, folder: Path) -> None:
    """Keep a report beside those of other architectures."""
    file = folder / f"{_NAME}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    keep(_NAME, known | {report["arch"]: report}, folder)


def show(report: Report) -> None:
    """The table, and why rows are missing."""
    where = report["machine"].get("gpu", "")
    show_table(
        f"{report['arch']} {report['sample_shape']} on {where}",
        ("system", "ms / step", "min - max", "x fp32", "x compiled", "peak GiB", "L2 error"),
        [_cells(row) for row in report["systems"]],
    )
    for row in report["systems"]:
        if "not_measured" in row:
            print(f"{row['system']}: not measured: {row['not_measured']}")
        if row.get("fallbacks"):
            print(f"{row['system']}: {len(row['fallbacks'])} operators on a slower path")


def _cells(row: Report) -> tuple[str, ...]:
    if "seconds" not in row:
        return (row["system"], "not measured", *[""] * 5)
    t = {name: 1000 * value for name, value in row["seconds"].items()}
    return (
        row["system"],
        f"{t['median']:.2f}",
        f"{t['min']:.2f} - {t['max']:.2f}",
        _shown(row, "speedup_over_fp32_eager", ".2f"),
        _shown(row, "speedup_over_fp16_torch_compile", ".2f"),
        f"{row['peak_bytes'] / GIB:.2f}",
        _shown(row, "relative_l2_to_fp32", ".4f"),
    )


def _shown(row: Report, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


if __name__ == "__main__":
    main()
