"""Steps are replayed on a CPU: the same bits as the graph's, whatever changes between them."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant import QuantizedModel
from fxquant.graph.lowered import LAYERS
from fxquant.runtime.program import Program
from fxquant.runtime.replay import ReplayedSteps
from tests.runtime import compiled as c

RECIPES = ("w8a8-fast", "w4a8-fast", "w4a4-fast")


@pytest.fixture(scope="module", autouse=True)
def _own_kernels() -> Iterator[None]:
    with c.own_kernels():
        yield


def flat(model: QuantizedModel, call: c.Call, group: int = 0) -> list[Tensor]:
    return [*model.signature.flatten((), call), model.table.row(group)]


@torch.no_grad()
def check(model: QuantizedModel, steps: ReplayedSteps, calls: list[c.Call], group: int = 0) -> None:
    """Each call gives what the graph gives."""
    for call in calls:
        tensors = flat(model, call, group)
        assert torch.equal(steps(*tensors), model.graph(*tensors))


def steps_of(model: QuantizedModel) -> ReplayedSteps:
    return ReplayedSteps(Program(model.graph))


def recordings(steps: ReplayedSteps) -> list[Any]:
    return [recording for recording in steps._recordings.values() if recording is not None]


@contextmanager
def counted(steps: ReplayedSteps, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of what calls do: "run" the program, "record" it, or "replay"."""
    done: list[str] = []

    def noted(patch: pytest.MonkeyPatch, name: str, owner: type, method: str) -> None:
        function = getattr(owner, method)
        patch.setattr(owner, method, lambda *args: (done.append(name), function(*args))[1])

    with monkeypatch.context() as patch:
        noted(patch, "run", Program, "__call__")
        noted(patch, "record", ReplayedSteps, "_recorded")
        noted(patch, "replay", type(recordings(steps)[0]), "replay")
        yield done


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_steps_have_the_bits_of_the_graph(recipe: str, backend: str) -> None:
    model = c.toy(recipe, backend)
    steps = steps_of(model)
    for seed, factor in enumerate((1.0, 1.0, 1.0, 1.5, 0.7)):
        tensors = flat(model, c.mixed_call(3, seed=seed))
        tensors[-1] = tensors[-1] * torch.tensor([factor, 1.0])
        with torch.no_grad():
            assert torch.equal(steps(*tensors), model.graph(*tensors))
    assert len(recordings(steps)) == 1


@pytest.mark.skipif(not c.FULL_SPEED, reason="oneDNN's integer kernels are used on x86 only")
def test_steps_with_onednn_are_not_replayed() -> None:
    """It takes scales as numbers: those of the recorded step would stay."""
    model = c.fresh(c.toy())
    for node in model.graph.graph.nodes:
        if node.target in LAYERS:
            assert node.args[-1] == "gemm"
            node.update_arg(len(node.args) - 1, "onednn")
    model.graph.recompile()
    steps = steps_of(model)
    for factor in (1.0, 1.0, 1.0, 1.5):
        tensors = flat(model, c.mixed_call(3))
        tensors[-1] = tensors[-1] * torch.tensor([factor, 1.0])
        with torch.no_grad():
            assert torch.equal(steps(*tensors), model.graph(*tensors))
    assert not recordings(steps)


@pytest.mark.parametrize("models", [c.unconditional, c.text_conditional])
def test_models_of_other_kinds_are_replayed(models: Callable[[], Any]) -> None:
    from tests import models as m

    original, model = models()
    calls = m.calls(original, 4, batch=2)
    steps = steps_of(model)
    check(model, steps, calls)
    assert len(recordings(steps)) == 1


def test_the_third_call_with_a_shape_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = c.toy()
    steps = steps_of(model)
    check(model, steps, [c.mixed_call(2)] * 2)
    with counted(steps, monkeypatch) as done:
        check(model, steps, [c.mixed_call(2)] * 2)
        assert done == ["replay"] * 2


def test_models_replay_by_themselves() -> None:
    model, call = c.fresh(c.toy()), {**c.mixed_call(2), "timestep": 7}
    expected = c.result(model, call)
    for _ in range(3):
        assert torch.equal(c.result(model, call), expected)
    assert len(recordings(model._served.steps)) == 1  # type: ignore[arg-type]


def test_rows_of_the_table_are_inputs() -> None:
    model = c.compile_mite(c.float32(timestep_groups=4))
    steps = steps_of(model)
    call = c.mite_calls(3)[1]
    for group in (0, 0, 0, 3, 1, 0):
        check(model, steps, [call], group)
    assert len(recordings(steps)) == 1


def test_results_belong_to_the_caller() -> None:
    model = c.toy()
    steps = steps_of(model)
    calls = [c.mixed_call(2, seed=i) for i in range(4)]
    with torch.no_grad():
        kept = [steps(*flat(model, call)) for call in calls]
        expected = [model.graph(*flat(model, call)) for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_shapes_used_longest_ago_go_first() -> None:
    model = c.toy()
    steps = ReplayedSteps(Program(model.graph), most=2)
    for size in (4, 8, 4, 8, 12, 12, 4, 4):
        check(model, steps, [c.mixed_call(2, (size, size))])
        assert len(steps._recordings) <= 2
    sizes = [recording.inputs[0].shape[2] for recording in recordings(steps)]
    assert sizes == [12, 4]


def test_another_number_of_threads_is_another_recording() -> None:
    model, threads = c.toy(), torch.get_num_threads()
    steps = steps_of(model)
    check(model, steps, [c.mixed_call(2)] * 3)
    try:
        torch.set_num_threads(threads + 1)
        check(model, steps, [c.mixed_call(2)] * 3)
    finally:
        torch.set_num_threads(threads)
    assert len(recordings(steps)) == 2


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_a_changed_tensor_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = c.fresh(c.toy())
    steps = steps_of(model)
    check(model, steps, [c.mixed_call(2)] * 3)
    for key, tensor in model.graph.state_dict().items():
        if key.endswith(f".{name}"):
            with torch.no_grad():
                tensor.copy_(tensor.flip(0))
    with counted(steps, monkeypatch) as done:
        check(model, steps, [c.mixed_call(2)] * 2)
        assert done == ["record", "replay"]


def test_a_tensor_in_the_place_of_another_is_seen() -> None:
    model = c.fresh(c.toy())
    steps = steps_of(model)
    call = c.mixed_call(2)
    check(model, steps, [call] * 3)
    before = steps(*flat(model, call))
    others = {k: v.flip(0) for k, v in model.graph.state_dict().items()}
    model.graph.load_state_dict(others, assign=True)
    assert not torch.equal(steps(*flat(model, call)), before)
    check(model, steps, [call] * 2)


def test_calls_at_once_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = c.toy()
    steps = steps_of(model)
    check(model, steps, [c.mixed_call(2)] * 3)
    with counted(steps, monkeypatch) as done, steps._lock:  # as another thread's call holds it
        check(model, steps, [c.mixed_call(2)])
    assert done == ["run"]


def test_who_watches_operators_sees_them() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.add(str(func))
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    model = c.toy()
    steps = steps_of(model)
    check(model, steps, [c.mixed_call(2)] * 3)
    with Seen(), torch.no_grad():
        steps(*flat(model, c.mixed_call(2)))
    with torch.no_grad(), torch.profiler.profile() as profile:
        steps(*flat(model, c.mixed_call(2)))
    profiled = {event.key for event in profile.key_averages()}
    for op in ("linear", "conv2d", "attention"):
        assert f"fxquant.{op}.default" in names
        assert f"fxquant::{op}" in profiled


def test_inference_mode_and_autocast_change_nothing() -> None:
    model, call = c.toy(), c.mixed_call(2)
    steps = steps_of(model)
    tensors = flat(model, call)
    with torch.no_grad():
        expected = model.graph(*tensors)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(steps(*tensors), expected)
    with torch.no_grad():
        assert torch.equal(steps(*tensors), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(steps(*tensors), model.graph(*tensors))


def test_copies_record_anew() -> None:
    model = c.fresh(c.toy())
    call = {**c.mixed_call(2), "timestep": 7}
    expected = c.result(model, call)
    for _ in range(2):
        c.result(model, call)
    copied = copy.deepcopy(model)
    assert not recordings(copied._served.steps)  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in model.graph.state_dict().values():
            tensor.zero_()
    for _ in range(3):
        assert torch.equal(c.result(copied, call), expected)


def test_steps_that_look_at_values_are_not_replayed(caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    item = graph.call_function(torch.ops.aten.item.default, (x,))
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, item)))
    steps = ReplayedSteps(Program(GraphModule(nn.Module(), graph)))
    with caplog.at_level(logging.INFO):
        for value in (2.0, 3.0, 4.0):
            assert steps(torch.tensor(value)) == value**2
    assert len([r for r in caplog.records if "not replayed" in r.message]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_torch_operators_are_repeated(seed: int) -> None:
    """Views, operators in place, several results, and tensors that outlive the rest."""

    class Some(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            low, high = x.chunk(2, dim=1)
            values, order = high.sort(dim=1)
            mixed = torch.cat([low, values.to(torch.float64)], dim=1).clone()
            mixed[:, 0] += y
            mixed.mul_(2)
            empty = mixed[:, :0]
            ranked = torch.cat([mixed.t().contiguous().t(), order.float(), empty], dim=1)
            return torch.nn.functional.pad(ranked, (1, 1)) + ranked.mean()

    g = torch.Generator().manual_seed(seed)
    example = (torch.randn(3, 8, generator=g), torch.randn(3, generator=g))
    module: Any = torch.export.export(Some(), example).module(check_guards=False)
    end = module.graph.output_node()
    end.args = (end.args[0][0],)  # the tensor, not a tuple of it
    module.recompile()
    steps = ReplayedSteps(Program(module))
    for _ in range(5):
        inputs = (torch.randn(3, 8, generator=g), torch.randn(3, generator=g))
        with torch.no_grad():
            assert torch.equal(steps(*inputs), Some()(*inputs))
    assert len(recordings(steps)) == 1


class Leaky(nn.Module):
    """Writes to one tensor, and returns another that is new."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.rrelu_with_noise(x, torch.ones_like(x), 0.1, 0.3, True)


class Normed(nn.Module):
    """Returns several new tensors beside those that it writes to."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x[0].neg(), x[1].exp()
        normed, found, _ = torch.ops.aten._native_batch_norm_legit(
            x, None, None, mean, variance, True, 0.1, 1e-5
        )
        return normed + found + mean * variance


@pytest.mark.parametrize("kind", [Leaky, Normed])
def test_operators_that_write_and_return_something_new_are_repeated(kind: type[nn.Module]) -> None:
    module, original = kind().eval(), kind().eval()
    graph = symbolic_trace(module)
    steps = ReplayedSteps(Program(graph))
    for seed in range(5):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.manual_seed(seed)
            served = steps(x)
            torch.manual_seed(seed)
            assert torch.equal(served, original(x))
    assert len(recordings(steps)) == 1


def test_memory_of_a_recording_is_that_of_its_largest_moment() -> None:
    model = c.toy()
    steps = steps_of(model)
    check(model, steps, [c.mixed_call(64, (32, 32))] * 2)
    arena = recordings(steps)[0].arena
    held = arena.size - sum(size for _, size in arena._free)
    output = recordings(steps)[0].output
    assert output.nbytes <= held <= 1.2 * output.nbytes + 4096
    size = arena.size
    check(model, steps, [c.mixed_call(64, (32, 32), seed=1)] * 2)
    assert arena.size == size


def test_a_program_is_pickled_without_its_recordings() -> None:
    steps = ReplayedSteps(Program(GraphModule(nn.Module(), _identity())), most=3)
    x = torch.ones(2)
    for _ in range(3):
        steps(x)
    again = pickle.loads(pickle.dumps(steps))
    assert not again._recordings
    assert again._most == 3
    assert torch.equal(again(x), x)


def _identity() -> Graph:
    graph = Graph()
    graph.output(
        graph.call_function(torch.neg, (graph.call_function(torch.neg, (graph.placeholder("x"),)),))
    )
    return graph
