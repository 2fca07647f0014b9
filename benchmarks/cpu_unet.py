"""One UNet step on the CPU: PyTorch, its compiler, OpenVINO, ONNX Runtime and fxquant.

    python benchmarks/cpu_unet.py --arch sd14 --folder out/cpu_unet

Random weights from the published configuration at full width: time and memory do not depend on
training. Every system has a process of its own and its own memory; all see the same inputs, are
calibrated with the same calls, and are asked for a step in turns. OpenVINO, ONNX Runtime and
fxquant load what another process converted and saved (kept in --folder); PyTorch's systems are made
from the float32 model in the process that serves them. If not all fit in memory at once they are
measured in groups, bf16 eager in each, and compared with the bf16 eager of their group.

first step: the call after loading; what compiles late compiles there (Inductor's cache is empty)
resident: bytes in memory after the last round
peak: the most from the start of loading, first step included; of PyTorch's systems from the moment
    that the model stands and a float32 original is gone
steps' peak: the most after the first step

Prints a table and writes benchmarks/results/cpu_unet_ARCH.json and .png. With --profile, also the
time by kind of operator in every system.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    GIB,
    HERE,
    command_line,
    folder_or_temporary,
    keep,
    machine,
    show_table,
    spread,
    step_arguments,
)
from served import Row, Settings, write_inputs
from systems import BF16, FP32, SYSTEMS, check_installed, slug
from workers import NotMeasured, Worker, take_turns

Report = dict[str, Any]
_PROCESS = 0.5 * GIB  # a process with torch in it and nothing else


def main() -> None:
    """Prepare, measure, report."""
    options = parsed()
    with folder_or_temporary(options.folder) as folder:
        settings = Settings(
            options.arch, options.batch, options.size, options.calls, options.threads, str(folder)
        )
        bench = Bench(settings, options.rounds, options.memory * GIB, options.profile)
        rows = bench.measure(options.systems)
    report = {
        "machine": {**machine(), "threads": options.threads},
        "command": command_line(),
        "arch": options.arch,
        "sample_shape": bench.shape,
        "fp32_weights_bytes": bench.weights,
        "calibration_calls": options.calls,
        "rounds": options.rounds,
        "systems": rows,
    }
    show(report)
    name = f"cpu_unet_{options.arch}"
    keep(name, report, options.results)
    chart(report, options.results / f"{name}.png")


def parsed() -> argparse.Namespace:
    """The options; fp32 eager is always among the systems, as the others' truth."""
    import torch

    parser = step_arguments(__doc__, rounds=5, calls=3)
    parser.add_argument(
        "--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], metavar="NAME",
        help=f"of: {', '.join(SYSTEMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=2, help="of the timed step; 2 is one image with guidance"
    )
    parser.add_argument(
        "--size", type=int, help="height and width of the latents; the config's by default"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="time by kind of operator")
    options = parser.parse_args()
    options.systems = [n for n in SYSTEMS if n in {FP32, *options.systems}]
    return options


class Bench:
    """Measures systems on one kind of step.

    Args:
        limit: bytes that all their processes may hold at a time.
        profile: also take the time by kind of operator.
    """

    def __init__(self, settings: Settings, rounds: int, limit: float, profile: bool = False):
        self.settings = settings
        self.rounds = rounds
        self.limit = limit
        self.profile = profile
        self.weights = write_inputs(settings)
        self.shape = list(settings.timed()["sample"].shape)
        self._alive: dict[str, Worker] = {}
        self._rows: dict[str, Report] = {}
        self._group = 0

    def measure(self, names: list[str]) -> list[Report]:
        """A row for every system: its figures, or why there are none."""
        self._rows = {name: {"system": name} for name in names}
        for name in names:
            with self._reporting(name):
                check_installed(name)
                self._prepare(name)
        try:
            self._measure_in_groups([n for n in names if "not_measured" not in self._rows[n]])
        finally:
            self._close()
        self._compare()
        return list(self._rows.values())

    def _prepare(self, name: str) -> None:
        if SYSTEMS[name].prepare is None:
            return
        note(f"preparing {name}")
        with self._worker(name) as worker:
            seconds = worker.ask("prepare", name=name, settings=asdict(self.settings))
        self._rows[name]["prepare_seconds"] = seconds

    def _measure_in_groups(self, names: list[str]) -> None:
        """What needs most memory to open goes first; a full house is measured and makes room."""
        others = sorted((n for n in names if n != BF16), key=lambda n: -SYSTEMS[n].opens)
        baseline = [BF16] if BF16 in names else []
        for name in baseline + others:
            needed = self._held() + SYSTEMS[name].opens * self.weights + _PROCESS
            if self._crowded(baseline) and needed > self.limit:
                self._make_room(baseline)
            row = dict(self._rows[name])
            self._open(name)
            if "not_measured" in self._rows[name] and self._crowded(baseline):
                self._make_room(baseline)
                self._rows[name] = row
                self._open(name)
        self._finish_group()

    def _crowded(self, baseline: list[str]) -> bool:
        return len(self._alive) > len(baseline)

    def _make_room(self, baseline: list[str]) -> None:
        self._finish_group()
        for name in baseline:
            self._open(name)

    def _open(self, name: str) -> None:
        """Load it and take its first step."""
        note(f"loading {name}")
        worker = self._worker(name)
        with self._reporting(name):
            try:
                stages = worker.ask("load", name=name, settings=asdict(self.settings))
                first = worker.ask("step")
                peak = worker.ask("forget_peak")
            except BaseException:
                worker.close()
                raise
            self._alive[name] = worker
            opened = {"stages_seconds": stages, "first_step_seconds": first, "peak_bytes": peak}
            self._rows[name] = opened | self._rows[name]  # of the first group, if there are more

    def _finish_group(self) -> None:
        """Rounds, then each system's memory, result and profile."""
        times, failed = take_turns(self._alive, self.rounds, note)
        medians = {name: spread(t) for name, t in times.items() if name not in failed}
        for name, worker in self._alive.items():
            row = self._rows[name]
            with self._reporting(name):
                if name in failed:
                    raise NotMeasured(failed[name])
                if "seconds" not in row:
                    row |= self._figures(name, worker, medians[name], times[name])
                    if BF16 in medians:
                        ratio = medians[BF16]["median"] / medians[name]["median"]
                        row["speedup_over_bf16_eager"] = ratio
        self._group += 1
        self._close()

    def _figures(
        self, name: str, worker: Worker, seconds: dict[str, float], rounds: list[float]
    ) -> Report:
        memory = worker.ask("memory")
        figures = {
            "group": self._group,
            "seconds": seconds,
            "rounds_seconds": rounds,
            "resident_bytes": memory["resident"],
            "resident_anonymous_bytes": memory["resident_anonymous"],
            "steps_peak_bytes": memory["peak"],
        }
        worker.ask("output", file=str(self._output(name)))
        if self.profile:
            figures["profile"] = worker.ask("profile")
        return figures

    def _compare(self) -> None:
        """Relative L2 error to float32, of the same input."""
        if not self._output(FP32).exists():
            return
        truth = np.load(self._output(FP32)).astype(np.float64)
        for name, row in self._rows.items():
            if "seconds" in row:
                error = np.load(self._output(name)) - truth
                row["relative_l2_to_fp32"] = float(np.linalg.norm(error) / np.linalg.norm(truth))

    def _output(self, name: str) -> Path:
        return self.settings.file(f"output-{slug(name)}-{self.settings.key}.npy")

    def _worker(self, name: str) -> Worker:
        return Worker(
            [str(HERE / "systems.py")],
            self.settings.file(f"{slug(name)}.log"),
            limit=self.limit,
            others=self._held,
        )

    def _held(self, but: Worker | None = None) -> int:
        return sum(worker.resident for worker in self._alive.values() if worker is not but)

    def _close(self) -> None:
        for worker in self._alive.values():
            worker.close()
        self._alive = {}

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        """What cannot be measured becomes a row that says why."""
        try:
            yield
        except NotMeasured as error:
            note(f"{name}: not measured: {error}")
            self._rows[name] = {"system": name, "not_measured": str(error)}


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def show(report: Report) -> None:
    """The table, and the profiles if there are any."""
    show_table(
        f"{report['arch']} {report['sample_shape']}, {report['machine']['threads']} threads",
        (
            "system", "s / step", "min - max", "x bf16", "first", "resident", "peak", "of steps",
            "L2 error",
        ),
        [_cells(row) for row in report["systems"]],
    )  # fmt: skip
    print("seconds, GiB, relative L2 error to fp32 eager; columns: see --help")
    for row in report["systems"]:
        if "not_measured" in row:
            print(f"{row['system']}: not measured: {row['not_measured']}")
    for row in report["systems"]:
        if "profile" in row:
            _show_profile(row["system"], row["profile"])


def _cells(row: Report) -> tuple[str, ...]:
    if "not_measured" in row:
        return (row["system"], "not measured", *[""] * 7)
    t, ratio = row["seconds"], row.get("speedup_over_bf16_eager")
    return (
        row["system"],
        f"{t['median']:.3f}",
        f"{t['min']:.3f} - {t['max']:.3f}",
        f"{ratio:.2f}" if ratio else "",
        f"{row['first_step_seconds']:.2f}",
        *(f"{row[k] / GIB:.2f}" for k in ("resident_bytes", "peak_bytes", "steps_peak_bytes")),
        f"{row['relative_l2_to_fp32']:.4f}" if "relative_l2_to_fp32" in row else "",
    )


def _show_profile(name: str, rows: list[Row], most: int = 15) -> None:
    total = sum(seconds for *_, seconds in rows) or 1.0
    show_table(
        f"{name}: time by kind of operator",
        ("kind", "calls", "s", "share"),
        [
            (kind[:60], str(calls), f"{seconds:.4f}", f"{100 * seconds / total:.1f} %")
            for kind, calls, seconds in rows[:most]
        ],
    )


def chart(report: Report, path: Path) -> None:
    """Seconds with their range, and memory, of every system that was measured."""
    from matplotlib.figure import Figure

    rows = [row for row in reversed(report["systems"]) if "seconds" in row]
    names = [row["system"] for row in rows]
    colours = ["C1" if name.startswith("fxquant") else "C0" for name in names]
    figure = Figure(figsize=(9, 0.4 * len(rows) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    seconds = [row["seconds"]["median"] for row in rows]
    low = [row["seconds"]["median"] - row["seconds"]["min"] for row in rows]
    high = [row["seconds"]["max"] - row["seconds"]["median"] for row in rows]
    bars = left.barh(names, seconds, xerr=[low, high], color=colours, capsize=2)
    left.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    left.set_xlabel("seconds a step: median and range")
    bars = right.barh(names, [row["peak_bytes"] / GIB for row in rows], color=colours)
    right.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    right.set_xlabel("peak memory from loading on, GiB")
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(f"{report['arch']} {report['sample_shape']}, {report['machine']['cpu']}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
