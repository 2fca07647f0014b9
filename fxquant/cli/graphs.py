"""Graphs of a model between passes, on random inputs: what dump and diff show."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxquant.calibration.calls import read_calls
from fxquant.calibration.example import example_call
from fxquant.compiler import fake_quantise
from fxquant.errors import PassError, near
from fxquant.graph import runner
from fxquant.graph.capture import capture
from fxquant.graph.dumps import CAPTURE, header
from fxquant.graph.options import Options
from fxquant.graph.runner import Record
from fxquant.passes import pipelines


def names() -> list[str]:
    """capture, then every pass in order."""
    return [CAPTURE, *(step.name for step in pipelines.ALL)]


def records_until(model: nn.Module, options: Options, last: str) -> list[Record]:
    """What capture and every pass up to `last` made.

    Raises:
        PassError: no pass has that name.
    """
    if last not in names():
        raise PassError(f"no pass is called {last!r}.{near(last, names())}")
    signature, calls = read_calls([example_call(model)], model)
    captured = capture(model, (), signature.unflatten(calls[0])).graph_module
    records = [Record(CAPTURE, 0.0, (0, len(captured.graph.nodes)), captured)]
    if last == CAPTURE:
        return records
    before_calibration = (*pipelines.PREPARE, *pipelines.OBSERVE)
    if _has(before_calibration, last):
        runner.run(before_calibration, captured, options, stop_after=last, on_pass=records.append)
        return records
    quantised = fake_quantise(model, signature, calls, options, on_pass=records.append)
    after_calibration = (*pipelines.LOWER, *pipelines.BIND)
    if _has(after_calibration, last):
        runner.run(
            after_calibration, quantised.graph, options, stop_after=last, on_pass=records.append
        )
    return records[: [r.name for r in records].index(last) + 1]


def _has(pipeline: Sequence[runner.Step], name: str) -> bool:
    return any(step.name == name for step in pipeline)
