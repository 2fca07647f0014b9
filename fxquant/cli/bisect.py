"""Find the pass, and the unit, that the error to the float model comes from.

Every graph between two passes runs on the same inputs; then every unit is looked at in the
fake-quant graph: its error with everything before it quantised (cumulative), and with only the unit
itself quantised (isolated). Errors are relative L2. Exits with 1 if --max-error is given and
exceeded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fxquant.calibration.calls import read_calls
from fxquant.cli.graphs import all_records, check_pass
from fxquant.cli.inputs import add_call_arguments, calls_for
from fxquant.cli.model import add_model_arguments, load_model
from fxquant.cli.output import check_writable, folder_named, show_json, show_table
from fxquant.compiler import FakeQuantised, check_backend
from fxquant.evaluate.bisect import (
    AfterPass,
    UnitError,
    activation_ranges,
    errors_after_passes,
    quantiser_units,
    unit_errors,
)
from fxquant.evaluate.figures import output
from fxquant.evaluate.plots import check_matplotlib, plot_activation_ranges, plot_unit_errors
from fxquant.graph.options import Options
from fxquant.graph.signature import Signature
from fxquant.logs import progress
from fxquant.recipe import Recipe

EXAMPLE = "fxquant bisect digits --recipe w4a8-fast --until fuse_producers"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_call_arguments(parser, calls=4, batch=2)
    parser.add_argument("--backend", default="auto", help="kernel family, default %(default)s")
    parser.add_argument("--until", metavar="PASS", help="the last pass to look at, default all")
    parser.add_argument(
        "--plots", type=folder_named, metavar="DIR",
        help="write errors.png and ranges.png, by unit and timestep (needs matplotlib)",
    )  # fmt: skip
    parser.add_argument("--max-error", type=float, metavar="E", help="exit with 1 above this")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(options: argparse.Namespace) -> int:
    if options.until:
        check_pass(options.until)
    if options.plots:
        check_matplotlib()
        check_writable(options.plots)
    settings = Options(
        Recipe.parse(options.recipe), backend=check_backend(options.backend), progress=True
    )
    model = load_model(options.model)
    signature, calls = read_calls(calls_for(model, options.model, options), model)
    records, fake = all_records(model, signature, calls, settings)
    signature = fake.signature
    calls = [signature.reformed(call) for call in calls]
    if options.until:
        last = [r.name for r in records].index(options.until)
        records = records[: last + 1]
    tensors, group = one_row(signature, fake, calls[len(calls) // 2])
    truth = output(model, signature.unflatten(tensors))
    passes = errors_after_passes(records, truth, tensors, fake.table, group, show=True)
    units = unit_errors(fake.graph, tensors, fake.table.row(group))
    show = _show_json if options.json else _show
    show(passes, units)
    if options.plots:
        write_plots(options.plots, signature, fake, calls)
    return int(options.max_error is not None and not passes[-1].error <= options.max_error)


def one_row(
    signature: Signature, fake: FakeQuantised, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], int]:
    """The samples of a call that use the same row of the table as its first, and that row."""
    if signature.timestep_index is None:
        return list(tensors), 0
    groups = fake.table.group(tensors[signature.timestep_index])
    group = int(groups[0])
    return [t[groups == group] for t in tensors], group


def write_plots(
    folder: Path, signature: Signature, fake: FakeQuantised, calls: Sequence[Sequence[Tensor]]
) -> None:
    """errors.png and ranges.png over all calls."""
    errors, ranges = {}, {}
    for number, call in enumerate(progress(calls, "plot", "call")):
        tensors, group = one_row(signature, fake, call)
        index, row = signature.timestep_index, fake.table.row(group)
        step = float(number) if index is None else float(tensors[index][0])
        errors[step] = unit_errors(fake.graph, tensors, row)
        ranges[step] = activation_ranges(fake.graph, tensors, row)
    folder.mkdir(parents=True, exist_ok=True)
    plot_unit_errors(errors, folder / "errors.png")
    plot_activation_ranges(ranges, quantiser_units(fake.graph), folder / "ranges.png")


def _show(passes: list[AfterPass], units: list[UnitError]) -> None:
    show_table(
        "error to the float model after each pass",
        ("pass", "relative L2", "jump"),
        [(p.name, f"{p.error:.6f}", f"{p.jump:+.6f}") for p in passes],
    )
    if jump := worst_pass(passes):
        print(f"biggest jump: {jump.name}, {jump.jump:+.6f}\n")
    show_table(
        "error at the output of each unit, fake-quantised",
        ("unit", "cumulative", "isolated"),
        [(f"{u.path}  {u.kind}", f"{u.cumulative:.6f}", f"{u.isolated:.6f}") for u in units],
    )
    if unit := worst_unit(units):
        print(f"worst by itself: {unit.path}, {unit.isolated:.6f}")


def _show_json(passes: list[AfterPass], units: list[UnitError]) -> None:
    jump, unit = worst_pass(passes), worst_unit(units)
    report: dict[str, Any] = {
        "passes": [asdict(p) for p in passes],
        "worst_pass": jump and jump.name,
        "units": [asdict(u) for u in units],
        "worst_unit": unit and unit.path,
    }
    show_json(report)


def worst_pass(passes: list[AfterPass]) -> AfterPass | None:
    """The pass with the biggest jump, None if none made the error larger."""
    return max((p for p in passes if p.jump > 0), key=lambda p: p.jump, default=None)


def worst_unit(units: list[UnitError]) -> UnitError | None:
    """The unit with the largest error of its own."""
    return max((u for u in units if u.isolated > 0), key=lambda u: u.isolated, default=None)
