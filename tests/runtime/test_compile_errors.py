"""What compile() and a compiled model refuse: a named error, what to do, and nothing half-done."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import (
    BackendError,
    CallError,
    CaptureError,
    FxquantError,
    LoaderError,
    RecipeError,
)
from tests.runtime import compiled as c


class Branches(c.Mite):
    """What is computed depends on the values."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        if sample.mean() > 0:
            sample = sample * 2
        return super().forward(sample, timestep)


class Leaves(c.Mite):
    """Part of it is computed outside torch."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        sample = torch.from_numpy(sample.numpy() * 2)
        return super().forward(sample, timestep)


def breaking_generator() -> Iterator[c.Call]:
    yield c.mite_calls()[0]
    raise OSError("disk on fire")


def without(name: str) -> c.Call:
    return {key: value for key, value in c.mite_calls()[0].items() if key != name}


def changed(**values: Any) -> c.Call:
    return {**c.mite_calls()[0], **values}


NAN = torch.full((2, 4, 8, 8), float("nan"))
X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": "w8a9-fast"}, RecipeError, r"unknown bits 'w8a9'.*[Dd]id you mean 'w8a8'"),
        ({"recipe": "w8a8-quick"}, RecipeError, "unknown effort 'quick'.*fast"),
        ({"recipe": "brecq:w8a8-fast"}, RecipeError, "unknown method 'brecq'.*eda_dm"),
        ({"recipe": "eight bits"}, RecipeError, r"form is \[method:\]bits\[-effort\]"),
        ({"recipe": "pcr:w8a8"}, RecipeError, "method 'pcr' is not available"),
        ({"recipe": 8}, RecipeError, "such as 'w8a8-fast'"),
        ({"backend": "x68"}, BackendError, "unknown backend 'x68'.*Did you mean 'x86'"),
        ({"model": lambda x: x}, CaptureError, "expected a torch.nn.Module, got function"),
        ({"model": None}, CaptureError, "expected a torch.nn.Module, got NoneType"),
        ({"model": Branches().eval()}, CaptureError, r"asks for the value of a tensor"),
        ({"model": Leaves().eval()}, CaptureError, r"Leaves[\s\S]*leaves torch"),
        ({"calib_loader": []}, LoaderError, r"yielded nothing.*record"),
        ({"calib_loader": iter(())}, LoaderError, "generator, it may have been used up"),
        ({"calib_loader": 5}, LoaderError, r"is a int, which cannot be iterated; give a list"),
        (
            {"calib_loader": breaking_generator()},
            LoaderError,
            "OSError after 1 calls: disk on fire",
        ),
        ({"calib_loader": [X]}, CallError, "call 0: expected a dict or a tuple"),
        ({"calib_loader": [without("timestep"), changed()]}, FxquantError, "timestep"),
        ({"calib_loader": [changed(), without("timestep")]}, CallError, "call 1.*lacks timestep"),
        ({"calib_loader": [changed(extra=X)]}, CallError, "call 0: unknown argument 'extra'"),
        ({"calib_loader": [changed(sample="x")]}, CallError, "call 0: .*holds no batched"),
        ({"calib_loader": [changed(sample=NAN)]}, CallError, "call 0: sample holds NaN"),
        (
            {"calib_loader": [changed(), changed(sample=X[0])]},
            CallError,
            "call 1: sample has shape",
        ),
        (
            {"calib_loader": [changed(timestep=torch.zeros(3))]},
            CallError,
            "timestep has 3 values for a batch of 2; give 1 or 2",
        ),
        ({"calib_loader": [changed(sample=X[:, :3])]}, CaptureError, "expected input.* 4 channels"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_a_remedy(
    arguments: dict[str, Any], error: type[FxquantError], message: str
) -> None:
    given = {"model": c.mite(), "calib_loader": c.mite_calls(), **arguments}
    with pytest.raises(error, match=message) as refusal:
        fxquant.compile(**given, progress=False)
    assert isinstance(refusal.value, FxquantError)


def test_the_cause_of_a_failing_loader_is_chained() -> None:
    with pytest.raises(LoaderError) as refusal:
        c.compiled(c.mite(), breaking_generator())
    assert isinstance(refusal.value.__cause__, OSError)


@pytest.mark.parametrize("refused", [Branches, Leaves])
def test_a_refusal_leaves_the_model_and_the_generator_as_they_were(refused: type[c.Mite]) -> None:
    model = refused().train()
    model.norm.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    with pytest.raises(CaptureError):
        c.compiled(model, c.mite_calls())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_refusal_of_a_module_names_it_and_the_line() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Branches()

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.inner(sample, timestep)[0]

    with pytest.raises(CaptureError, match=r"module inner \(Branches\), test_compile_errors\.py:"):
        c.compiled(Outer().eval(), c.mite_calls())


def test_after_a_refusal_the_same_model_compiles() -> None:
    model = c.mite()
    with pytest.raises(CaptureError):
        c.compiled(model, [changed(sample=X[:, :3])])
    quantised = c.compile_mite(c.float32(), model)
    call = c.mite_calls()[1]
    assert torch.equal(c.result(quantised, call), c.result(c.shared_mite(), call))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "lacks sample, timestep"),
        ((X,), {}, "lacks timestep.*same arguments"),
        ((X, None), {}, "lacks timestep"),
        ((X[0], 1.0), {}, r"sample has shape \(4, 8, 8\); 4 dimensions"),
        ((X, torch.zeros(3)), {}, "give 1 or 2"),
        ((X, 1.0, True, 4), {}, "4 positional arguments; forward takes sample, timestep"),
        ((X, 1.0), {"class_labels": X}, "unknown argument 'class_labels'; forward takes sample"),
        ((X, 1.0), {"sample": X}, "'sample' is given twice"),
        (("x", 1.0), {}, "sample is a str, in the first calibration call it was a tensor"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_and_the_next_one_served(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    model, call = c.shared_mite(), c.mite_calls()[1]
    before = c.result(model, call)
    with pytest.raises(CallError, match=message):
        model(*args, **kwargs)
    assert torch.equal(c.result(model, call), before)


def test_conditions_of_another_batch_size_are_refused() -> None:
    call = c.mixed_call(3)
    call["encoder_hidden_states"] = call["encoder_hidden_states"][:2]
    message = r"encoder_hidden_states has shape \(2, 7, 16\).*0 must be 3, to go with sample"
    with pytest.raises(CallError, match=message):
        c.toy()(**call)
