"""One compiled model serves any batch and size, copies and restores, and stays where it is.

The bounds of "equal": a quantised network is chaotic, a last-bit difference in a float layer may
flip an integer. So other batch sizes and kernels are compared within a fraction of the error that
quantisation makes anyway; the same computation is compared bitwise.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import QuantizedModel
from fxquant.errors import BackendError, CallError
from tests.runtime import compiled as c
from tests.toy import relative_error

RECIPES = ("w8a8-fast", "w4a8-fast")


def check_close_to_float(call: c.Call) -> None:
    result, expected = c.result(c.toy(), call), c.result(c.float_toy(), call)
    assert result.shape == expected.shape
    assert relative_error(result, expected) < 0.05
    assert max(c.errors(result, expected)) < 0.1


@pytest.mark.parametrize("batch", [1, 2, 63, 64, 100])
def test_any_batch_size_is_served(batch: int) -> None:
    check_close_to_float(c.mixed_call(batch))


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 6), (32, 32)])
def test_any_spatial_size_is_served(size: tuple[int, int]) -> None:
    check_close_to_float(c.mixed_call(3, size))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    call, wrong = c.mixed_call(100), c.mixed_call(100)
    wrong["timestep"] = wrong["timestep"].roll(1)
    together = c.result(c.toy(), call)
    error = relative_error(together, c.result(c.float_toy(), call))
    for size in (1, 7, 64):
        alone = torch.cat(
            [c.result(c.toy(), c.part(call, i, i + size)) for i in range(0, 100, size)]
        )
        assert relative_error(alone, together) < 0.3 * error
        assert max(c.errors(alone, together)) < 2 * error
    assert relative_error(c.result(c.toy(), wrong), together) > 2 * error  # so the bounds can fail


def test_a_call_is_repeatable_bit_for_bit() -> None:
    call = c.mixed_call(5)
    assert torch.equal(c.result(c.toy(), call), c.result(c.toy(), call))


def test_a_call_leaves_its_arguments_alone() -> None:
    call = c.mixed_call(3)
    before = copy.deepcopy(call)
    c.result(c.toy(), call)
    assert all(torch.equal(call[name], before[name]) for name in call)


def test_results_of_two_calls_do_not_share_memory() -> None:
    call = c.mixed_call(2)
    first = c.result(c.toy(), call)
    kept = first.clone()
    c.result(c.toy(), c.mixed_call(2, seed=1))
    assert torch.equal(first, kept)


def test_inference_mode_changes_nothing() -> None:
    call = c.mixed_call(3)
    model = c.fresh(c.toy())
    with torch.inference_mode():
        inside = c.result(model, call).clone()
    assert torch.equal(inside, c.result(model, call))
    assert torch.equal(inside, c.result(c.toy(), call))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_deep_copy_gives_the_same_bits_and_owns_its_tensors(recipe: str) -> None:
    call, original = c.mixed_call(3), c.toy(recipe)
    expected = c.result(original, call)
    copied = copy.deepcopy(original)
    assert torch.equal(c.result(copied, call), expected)
    assert not addresses(copied) & addresses(original)
    wipe(copied)
    assert not torch.equal(c.result(copied, call), expected)
    assert torch.equal(c.result(original, call), expected)


def addresses(model: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in model.state_dict().values()}


def wipe(model: nn.Module) -> None:
    """Zeros everywhere but in the table, whose scales may not be zero."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.startswith("table."):
                tensor.zero_()


def test_train_and_eval_change_nothing() -> None:
    call, model = c.mixed_call(3), c.fresh(c.toy())
    expected = c.result(model, call)
    assert model.train() is model
    assert torch.equal(c.result(model, call), expected)
    assert model.eval() is model
    assert torch.equal(c.result(model, call), expected)


def test_a_part_of_a_module_that_is_trained_stays_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = c.fresh(c.shared_mite())
    whole = nn.ModuleList([model, nn.Linear(2, 2)])
    with caplog.at_level(logging.WARNING):
        assert whole.train() is whole.eval() is whole.train() is whole
    assert not any(part.training for part in model.modules())
    assert whole[1].training
    assert len([r for r in caplog.records if "train() changes nothing" in r.message]) == 1


def breaking(model: QuantizedModel, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """From now on its graph raises."""

    def run(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(model, "run", run)


def test_sizes_that_torch_refuses_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = c.fresh(c.shared_mite())
    served, other = c.mite_calls(batch=2)[0], c.mite_calls(batch=11)[0]  # by no other test
    c.result(model, served)
    breaking(model, monkeypatch, RuntimeError("The size of tensor a (8) must match"))
    with pytest.raises(CallError, match=r"sample \[11, 4, 8, 8\].*The size of tensor a") as refusal:
        c.result(model, other)
    assert isinstance(refusal.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="The size of tensor a"):  # sizes are not to blame
        c.result(model, served)


def test_what_sizes_are_not_to_blame_for_is_raised_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = c.fresh(c.shared_mite())
    breaking(model, monkeypatch, torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        c.result(model, c.mite_calls()[0])


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_dict_restores_a_wiped_model_that_already_ran(recipe: str, assign: bool) -> None:
    call, original = c.mixed_call(3), c.toy(recipe)
    expected = c.result(original, call)
    restored = copy.deepcopy(original)
    wipe(restored)
    assert not torch.equal(c.result(restored, call), expected)  # its kernels packed the zeros
    restored.load_state_dict(copy.deepcopy(original.state_dict()), assign=assign)
    assert torch.equal(c.result(restored, call), expected)


def test_a_state_dict_of_other_weights_replaces_those_in_use() -> None:
    call = c.mite_calls(n=2, seed=1)[1]
    mine, other = c.compile_mite(c.float32()), c.compile_mite(c.float32(), c.mite(seed=1))
    expected = c.result(other, call)
    assert not torch.equal(c.result(mine, call), expected)
    mine.load_state_dict(other.state_dict())
    assert torch.equal(c.result(mine, call), expected)


def test_a_model_made_in_inference_mode_takes_a_state_dict_later() -> None:
    with torch.inference_mode():
        mine = c.compile_mite(c.float32())
    other, call = c.compile_mite(c.float32(), c.mite(seed=1)), c.mite_calls(n=2, seed=1)[1]
    assert torch.equal(c.result(mine, call), c.result(c.shared_mite(), call))
    mine.load_state_dict(other.state_dict())
    assert torch.equal(c.result(mine, call), c.result(other, call))


def test_a_state_dict_holds_everything_that_results_depend_on() -> None:
    state = c.toy().state_dict()
    assert {tensor.dtype for tensor in state.values()} >= {torch.int8, torch.float32}
    assert {"table.values", "table.timesteps", "table.groups"} <= set(state)
    assert all(isinstance(tensor, Tensor) for tensor in state.values())


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.to(dtype=torch.float64),
        lambda m: m.to(torch.empty(0, dtype=torch.float16)),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: nn.ModuleDict({"unet": m}).half()["unet"],
        lambda m: nn.ModuleDict({"unet": m}).to(torch.float16)["unet"],
    ],
)
def test_another_dtype_is_refused_with_a_warning_and_changes_nothing(
    ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    call = c.mite_calls()[2]
    model = c.fresh(c.shared_mite())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        assert ask(model) is model
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "keeps its precision" in caplog.text
    same_state(model, before)
    assert torch.equal(c.result(model, call), c.result(c.shared_mite(), call))


def same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.device) == (expected[name].dtype, expected[name].device)
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.to("cpu"),
        lambda m: m.cpu(),
        lambda m: m.to(torch.float32),
        lambda m: m.float(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.requires_grad_(False),
        lambda m: nn.ModuleDict({"unet": m}).to("cpu", memory_format=torch.channels_last)["unet"],
    ],
)
def test_what_the_model_already_has_is_granted_silently(
    ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    call = c.mite_calls()[2]
    model = c.fresh(c.shared_mite())
    assert ask(model) is model
    assert not caplog.records
    assert torch.equal(c.result(model, call), c.result(c.shared_mite(), call))


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta", torch.device("cuda")])
def test_another_device_is_refused_with_a_remedy(device: Any) -> None:
    model = c.shared_mite()
    with pytest.raises(BackendError, match=r"chosen for cpu.*compile it again"):
        model.to(device)
    with pytest.raises(BackendError, match=r"chosen for cpu"):
        model.to(device, torch.float16)
    assert model.device == torch.device("cpu")


def test_an_enclosing_module_cannot_move_it_to_another_device() -> None:
    model = c.fresh(c.shared_mite())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BackendError, match="to serve on meta"):
        nn.ModuleDict({"unet": model}).to("meta")
    same_state(model, before)


def compiled_graph_agrees(model: QuantizedModel, backend: str, bound: float) -> None:
    """torch.compile of the graph against the graph, at two batch and image sizes."""
    fast = torch.compile(model.graph, backend=backend)
    for call in (c.mixed_call(2), c.mixed_call(5, (12, 16))):
        tensors = model.signature.flatten((), call)
        with torch.no_grad():
            got = fast(*tensors, model.table.row(0))
            expected = model.graph(*tensors, model.table.row(0))
        assert relative_error(got, expected) <= bound


@pytest.fixture
def _clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_clean_dynamo")
def test_torch_compile_takes_the_graph() -> None:
    compiled_graph_agrees(c.toy(), "aot_eager", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("_clean_dynamo")
def test_inductor_takes_the_graph() -> None:
    compiled_graph_agrees(c.toy(), "inductor", 0.005)


def test_fewer_bits_cost_accuracy_in_order() -> None:
    call = c.mixed_call(32)
    expected = c.result(c.float_toy(), call)
    w8a8, w4a8, w4a4 = (
        relative_error(c.result(c.toy(name), call), expected)
        for name in ("w8a8-fast", "w4a8-fast", "w4a4-fast")
    )
    assert 0 < 2 * w8a8 < w4a8 < w4a4 / 1.5
    assert w8a8 < 0.05
    assert w4a8 < 0.25
    assert w4a4 < 0.6


def test_the_reference_backend_agrees_with_the_fast_one() -> None:
    call, reference = c.mixed_call(16), c.toy(backend="reference")
    assert {name.split()[1] for name in reference.summary.kernels} == {"reference"}
    expected = c.result(c.float_toy(), call)
    fast, slow = c.result(c.toy(), call), c.result(reference, call)
    error = relative_error(fast, expected), relative_error(slow, expected)
    assert error[0] < 1.1 * error[1] < 1.21 * error[0]
    assert relative_error(fast, slow) < max(error)
    same_state(reference, c.toy().state_dict())


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for device, said in (("cuda:63", "PyTorch sees"), ("meta", "not on meta"), ("tpu", "device")):
        with pytest.raises(BackendError, match=said):
            fxquant.load(tmp_path / "nothing", device=device)


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(BackendError, match="CUDA graphs need a GPU; this model runs on cpu"):
        c.shared_mite().capture_steps()
