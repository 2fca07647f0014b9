"""Weights that change between steps: every later step is served with them, replayed or not.

Each case first failed, or could have, in a way that only the second step after the change shows.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import fxquant
from fxquant import QuantizedModel
from fxquant.errors import BackendError
from fxquant.kernels import calls, pack
from fxquant.kernels.machine import detect
from fxquant.kernels.pack import Packed
from fxquant.runtime.arena import Arena
from fxquant.runtime.program import Program
from fxquant.runtime.replay import NotRepeatableError, ReplayedSteps, _Recorder
from tests.kernels import cases
from tests.runtime import compiled as c

CALLS = c.mite_calls(3)


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose steps are replayed, also where a CPU has AMX."""
    if detect().has_vnni:
        monkeypatch.setenv("FXQUANT_CPU", "vnni")


@functools.cache
def compiled(recipe: str) -> QuantizedModel:
    return c.compile_mite(c.float32(recipe))


@pytest.fixture(params=["w8a8-fast", "w4a8-fast"])
def model(request: pytest.FixtureRequest) -> QuantizedModel:
    """One that replays."""
    model = c.fresh(compiled(request.param))
    for call in (*CALLS, CALLS[0]):
        c.result(model, call)
    return model


def check(model: QuantizedModel, times: int = 2) -> None:
    """Step after step is what a model that never ran makes of the same weights."""
    new = copy.deepcopy(model)
    expected = [c.result(new, call) for call in CALLS[:1]] * 2 + [c.result(new, CALLS[1])]
    del new
    for _ in range(times):
        served = [c.result(model, call) for call in (CALLS[0], CALLS[0], CALLS[1])]
        assert all(torch.equal(a, b) for a, b in zip(served, expected, strict=True))


def flipped(model: QuantizedModel) -> dict[str, Tensor]:
    """Other weights for the model."""
    state = model.graph.state_dict().items()
    return {k: v.flip(0).clone() if "weight" in k or "bias" in k else v for k, v in state}


def load_the_same(model: QuantizedModel) -> None:
    model.load_state_dict(model.state_dict())


def load_others(model: QuantizedModel) -> None:
    model.graph.load_state_dict(flipped(model))


def load_others_in_inference_mode(model: QuantizedModel) -> None:
    with torch.inference_mode():
        model.graph.load_state_dict(flipped(model))


def assign_others(model: QuantizedModel) -> None:
    model.graph.load_state_dict(flipped(model), assign=True)


def assign_data(model: QuantizedModel) -> None:
    for name, tensor in model.graph.state_dict(keep_vars=True).items():
        if "weight" in name:
            tensor.data = tensor.flip(0).clone()


def change_in_place(model: QuantizedModel) -> None:
    for name, tensor in model.graph.state_dict(keep_vars=True).items():
        if "weight" in name:
            with torch.no_grad():
                tensor.copy_(tensor.flip(0).clone())


def write_data_and_say_so(model: QuantizedModel) -> None:
    for name, tensor in model.graph.state_dict(keep_vars=True).items():
        if "weight" in name:
            tensor.data.copy_(tensor.flip(0).clone())
            torch.autograd.graph.increment_version(tensor)


def replace_modules(model: QuantizedModel) -> None:
    new = copy.deepcopy(model.graph)
    new.load_state_dict(flipped(model))
    for name, module in new.named_children():
        setattr(model.graph, name, module)


def turn_buffers_into_parameters(model: QuantizedModel) -> None:
    for module in model.graph.modules():
        for name, tensor in list(module.named_buffers(recurse=False)):
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))


CHANGES = (
    load_the_same, load_others, load_others_in_inference_mode, assign_others, assign_data,
    change_in_place, write_data_and_say_so, replace_modules, turn_buffers_into_parameters,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_serve_from_the_next_step_on(
    model: QuantizedModel, change: Callable[[QuantizedModel], None]
) -> None:
    before = c.result(model, CALLS[0])
    change(model)
    check(model)
    same = change in (load_the_same, turn_buffers_into_parameters)
    assert torch.equal(c.result(model, CALLS[0]), before) == same
    change(model)
    check(model)
    assert torch.equal(c.result(model, CALLS[0]), before), "every change is its own inverse"


def test_a_loaded_model_takes_other_weights(model: QuantizedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    check(loaded)
    load_others(loaded)
    check(loaded)
    load_others(model)
    assert torch.equal(c.result(loaded, CALLS[0]), c.result(model, CALLS[0]))
    assert not torch.equal(
        c.result(fxquant.load(tmp_path / "saved"), CALLS[0]), c.result(model, CALLS[0])
    ), "the files stay as they were"


def test_weights_made_in_inference_mode_serve_and_are_not_kept(model: QuantizedModel) -> None:
    with torch.inference_mode():
        assign_others(model)
        check(model)
        for name, tensor in model.graph.state_dict().items():
            if name.endswith("weight"):
                tensor.copy_(tensor.flip(0).clone())
        check(model)


def test_the_memory_of_a_replaced_weight_is_not_taken_for_it() -> None:
    """Two assignments in a row may bring a third weight to the first one's address."""
    weight = cases.integers(64, 64)
    made: list[Tensor] = []

    def make() -> Packed:
        made.append(weight.clone())
        return Packed(weight.clone(), torch.zeros(1))

    for _ in range(20):
        first = pack.packed(weight, make)
        assert torch.equal(first.weight, weight)
        weight.data = torch.zeros_like(weight)
        weight.data = cases.integers(64, 64).add_(len(made))


def test_nothing_packed_is_part_of_a_recording() -> None:
    def make() -> Packed:
        calls.call(len, "prepared")
        return Packed(torch.ones(3) + 1, torch.zeros(3))

    weight, recorded = cases.integers(3, 4), list[calls.Call]()
    with torch.no_grad(), calls.written_down(recorded), _Recorder(recorded, Arena()):
        packed = pack.packed(weight, make)
        assert not torch.empty(3).untyped_storage().resizable(), "what else is made here"
    assert all(part.untyped_storage().resizable() for part in packed)
    assert not recorded


def test_what_is_packed_into_memory_of_others_is_refused() -> None:
    borrowed = torch.frombuffer(bytearray(12), dtype=torch.float32)
    with pytest.raises(BackendError, match="used for something else"):
        pack.packed(cases.integers(3, 4), lambda: Packed(borrowed, torch.zeros(3)))


def program(module: nn.Module) -> Program:
    """The module's forward, operator by operator."""
    exported = torch.export.export(module, (torch.randn(2, 8),)).module(check_guards=False)
    end = exported.graph.output_node()
    end.args = (end.args[0][0],)
    exported.recompile()
    assert isinstance(exported, GraphModule)
    return Program(exported)


def test_random_operators_draw_anew_in_every_replay() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn_like(x) + torch.rand(8) + torch.nn.functional.dropout(x, 0.5)
            return x + noise.bernoulli_(0.5) * torch.randn(2, 8)

    run = program(Noisy())
    steps = ReplayedSteps(run)
    x = torch.randn(2, 8)
    with torch.no_grad():
        results = []
        for seed in (0, 1, 2, 3, 4, 3):
            torch.manual_seed(seed)
            results.append(steps(x))
            torch.manual_seed(seed)
            assert torch.equal(results[-1], run(x)), "the numbers that the program would draw"
    assert all(recording is not None for recording in steps._recordings.values())
    assert not torch.equal(results[2], results[3])
    assert torch.equal(results[3], results[5])


def test_shapes_that_values_decide_are_not_replayed(caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    chosen = graph.call_function(torch.ops.aten.masked_select.default, (
        x, graph.call_function(torch.ops.aten.gt.Scalar, (x, 0)),
    ))  # fmt: skip
    graph.output(graph.call_function(torch.ops.aten.sum.default, (chosen,)))
    steps = ReplayedSteps(Program(GraphModule(nn.Module(), graph)))
    with caplog.at_level(logging.INFO):
        for x in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [-1.0, 7.0], [1.0, 1.0]):
            given = torch.tensor(x)
            assert steps(given) == given[given > 0].sum()
    assert "values decide a shape" in caplog.text


def test_a_step_that_keeps_something_is_not_replayed(caplog: pytest.LogCaptureFixture) -> None:
    kept: dict[str, Tensor] = {}

    def lazy(x: Tensor) -> Tensor:
        if "table" not in kept or kept["table"].shape != x.shape:
            kept["table"] = torch.arange(x.numel()).reshape(x.shape) * 1.0
        return x * kept["table"] + torch.ones_like(x) * 3

    graph = Graph()
    graph.output(graph.call_function(lazy, (graph.placeholder("x"),)))
    steps = ReplayedSteps(Program(GraphModule(nn.Module(), graph)))
    steps(torch.ones(4))
    kept.clear()  # as if it were made in the second step
    with caplog.at_level(logging.INFO):
        for value in range(5):
            x = torch.full((4,), float(value))
            assert torch.equal(steps(x), x * torch.arange(4) + 3)
    assert "something keeps what was made" in caplog.text
    kept.clear()
    with pytest.raises(NotRepeatableError, match="something keeps"):
        steps._recorded([torch.ones(4)])


def test_another_graph_in_its_place_serves_and_is_replayed(model: QuantizedModel) -> None:
    """Program and steps are replaced together."""
    other = c.compile_mite(model.recipe, c.mite(seed=1))
    served = model._served
    model.graph = other.graph
    for call in (*CALLS, *CALLS):
        expected = other.graph(*other.signature.flatten((), call), model.table.row(0))
        assert torch.equal(c.result(model, call), expected)
    assert model._served is not served
    assert model._served.program.graph is other.graph
    assert model._served.steps._program is model._served.program  # type: ignore[attr-defined]
