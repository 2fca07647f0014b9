"""CUDA graphs are captured anew when what they were made of changed; told on a CPU, with fakes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant import QuantizedModel
from fxquant.runtime.cuda_graph import CapturedSteps
from fxquant.runtime.program import Program
from tests.runtime import compiled as c


class Graph:
    """Replays what it saw: with the weights of the capture, as CUDA graphs do."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.replays: list[Callable[[], object]] = []

    def replay(self) -> None:
        for call in self.replays:
            call()


class Stream:
    def wait_event(self, event: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...


class Event:
    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...


@contextlib.contextmanager
def capture(graph: Graph, **options: Any) -> Any:
    Graph.capturing = graph
    yield
    Graph.capturing = None


class Frozen(Program):
    """What is captured of it computes with weights as they were."""

    def run(self, *tensors: Tensor) -> Tensor:
        output = super().run(*tensors)
        if Graph.capturing is not None:
            weights = [tensor.clone() for tensor in self.reading().tensors()]
            function = self.reading().function
            Graph.capturing.replays.append(lambda: output.copy_(function(*tensors, *weights)))
        return output


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> QuantizedModel:
    """One whose steps are captured."""
    for name, fake in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "Event": Event,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    model = c.fresh(c.shared_mite())
    program = Frozen(model.graph)
    model._served = type(model._served)(program, CapturedSteps(program))
    return model


def check(model: QuantizedModel) -> None:
    """Steps are the graph's."""
    for call in c.mite_calls(3):
        with torch.no_grad():
            tensors = [*model.signature.flatten((), call), model.table.row(0)]
            assert torch.equal(c.result(model, call), model.graph(*tensors))


def captures(model: QuantizedModel) -> list[Any]:
    steps: Any = model._served.steps
    return [*steps._captured.values()]


def test_a_graph_serves_as_long_as_nothing_changes(model: QuantizedModel) -> None:
    check(model)
    first = captures(model)
    check(model)
    assert captures(model) == first
    assert len(first) == 1


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_changed_tensor_is_captured_anew(model: QuantizedModel, name: str, assign: bool) -> None:
    check(model)
    state = {
        key: tensor.flip(0) if key.endswith(f".{name}") else tensor
        for key, tensor in model.graph.state_dict().items()
    }
    first = captures(model)
    model.graph.load_state_dict(state, assign=assign)
    check(model)
    assert len(captures(model)) == 1
    assert captures(model) != first


def test_a_recompiled_graph_is_captured_anew(model: QuantizedModel) -> None:
    check(model)
    end = model.graph.graph.output_node()
    with model.graph.graph.inserting_before(end):
        end.args = (model.graph.graph.call_function(torch.neg, (end.args[0],)),)
    model.graph.recompile()
    check(model)


def test_weights_that_count_no_changes_are_run(
    model: QuantizedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode():
        state = {key: tensor.clone() for key, tensor in model.graph.state_dict().items()}
    model.graph.load_state_dict(state, assign=True)
    with caplog.at_level(logging.WARNING):
        check(model)
    assert len([r for r in caplog.records if "not captured" in r.message]) == 1
    assert not captures(model)


def test_another_graph_in_its_place_runs_uncaptured(model: QuantizedModel) -> None:
    check(model)
    model.graph = c.compile_mite(model.recipe, c.mite(seed=1)).graph
    check(model)
    assert not isinstance(model._served.steps, CapturedSteps)
    assert model._served.program.graph is model.graph


def test_capture_steps_takes_the_present_graph(
    model: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Program and steps are replaced as one, after the graph was, too."""
    on_gpu = property(lambda self: torch.device("cuda"))
    for graph in (model.graph, c.compile_mite(model.recipe, c.mite(seed=1)).graph):
        model.graph = graph
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "device", on_gpu)
            assert model.capture_steps() is model
        steps = model._served.steps
        assert isinstance(steps, CapturedSteps)
        assert steps._program is model._served.program
        assert model._served.program.graph is graph
        assert not captures(model)
