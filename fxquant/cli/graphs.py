"""Graphs of a model between passes: what dump, diff and bisect show."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fxquant.calibration.calls import read_calls
from fxquant.calibration.example import example_call
from fxquant.compiler import FakeQuantised, fake_quantise
from fxquant.errors import PassError, near
from fxquant.graph import runner
from fxquant.graph.capture import capture_flat
from fxquant.graph.dumps import CAPTURE, header
from fxquant.graph.options import Options
from fxquant.graph.runner import Record
from fxquant.graph.signature import Signature
from fxquant.passes import pipelines

__all__ = ["CAPTURE", "all_records", "check_pass", "header", "names", "records_until"]


def names() -> list[str]:
    """capture, then every pass in order."""
    return [CAPTURE, *(step.name for step in pipelines.ALL)]


def check_pass(name: str) -> None:
    """Raise PassError for a name that neither capture nor a pass has."""
    if name not in names():
        raise PassError(f"no pass is called {name!r}.{near(name, names())}")


def records_until(model: nn.Module, options: Options, last: str) -> list[Record]:
    """What capture and every pass up to `last` made of the model, on random inputs.

    Raises:
        PassError: no pass has that name.
    """
    check_pass(last)
    signature, calls = read_calls([example_call(model)], model)
    before_calibration = (*pipelines.PREPARE, *pipelines.OBSERVE)
    if last != CAPTURE and not any(step.name == last for step in before_calibration):
        return _until(last, all_records(model, signature, calls, options)[0])
    captured = capture_flat(model, signature, calls[0]).graph_module
    records = [Record(CAPTURE, 0.0, (0, len(captured.graph.nodes)), captured)]
    if last != CAPTURE:
        runner.run(before_calibration, captured, options, stop_after=last, on_pass=records.append)
    return records


def all_records(
    model: nn.Module, signature: Signature, calls: Sequence[Sequence[Tensor]], options: Options
) -> tuple[list[Record], FakeQuantised]:
    """What capture and every pass made, calibrated on the given calls, and the simulated model."""
    records: list[Record] = []
    quantised = fake_quantise(model, signature, calls, options, on_pass=records.append)
    runner.run(
        (*pipelines.LOWER, *pipelines.BIND),
        quantised.graph,
        options,
        on_pass=records.append,
    )
    return records, quantised


def _until(last: str, records: list[Record]) -> list[Record]:
    return records[: [r.name for r in records].index(last) + 1]
