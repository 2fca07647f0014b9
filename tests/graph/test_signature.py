"""How forward calls become flat tensors: all spellings of a call, all calls that are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CallError
from fxquant.graph.signature import Signature, bind, signature_of
from tests import models

BATCH = 3
SAMPLE, CONDITION = torch.ones(BATCH, 4, 8, 8), torch.full((BATCH, 5, 16), 2.0)
TIMES = torch.tensor([7, 8, 9])


class Denoiser(nn.Module):
    """A forward with every kind of argument that diffusers' have; it is never run."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        residuals: tuple[Tensor, ...] | None = None,
        return_dict: bool = True,
    ) -> None: ...


def signature(**call: Any) -> Signature:
    given = {"sample": SAMPLE, "timestep": TIMES, **call}
    return signature_of(Denoiser(), (), given)


CONDITIONED = signature(encoder_hidden_states=CONDITION)


def test_positional_and_keyword_arguments_give_the_same_tensors() -> None:
    spelt = [
        ((SAMPLE, TIMES, CONDITION), {}),
        ((SAMPLE,), {"encoder_hidden_states": CONDITION, "timestep": TIMES}),
        ((), {"encoder_hidden_states": CONDITION, "timestep": TIMES, "sample": SAMPLE}),
        ((SAMPLE, TIMES, CONDITION, None, None, None, False), {}),
        ((SAMPLE, TIMES), {"encoder_hidden_states": CONDITION, "return_dict": False}),
    ]
    for args, kwargs in spelt:
        sample, timestep, condition = CONDITIONED.flatten(args, kwargs)
        assert torch.equal(sample, SAMPLE)
        assert torch.equal(timestep, TIMES.float())
        assert torch.equal(condition, CONDITION)


def test_names_follow_forward_and_not_the_call() -> None:
    found = signature_of(
        Denoiser(),
        (),
        {
            "residuals": (SAMPLE, SAMPLE),
            "added_cond_kwargs": {"text_embeds": torch.ones(BATCH, 6), "ignored": None},
            "timestep": 1,
            "sample": SAMPLE,
        },
    )
    assert found.names == (
        "sample",
        "timestep",
        "added_cond_kwargs.text_embeds",
        "residuals.0",
        "residuals.1",
    )
    assert found.ranks == (4, 1, 2, 4, 4)


def test_a_nested_dict_is_found_by_key_whatever_its_order() -> None:
    text, ids = torch.ones(BATCH, 6), torch.zeros(BATCH, 2)
    found = signature(added_cond_kwargs={"text_embeds": text, "time_ids": ids})
    flat = found.flatten((SAMPLE, 1), {"added_cond_kwargs": {"time_ids": ids, "text_embeds": text}})
    assert torch.equal(flat[found.names.index("added_cond_kwargs.text_embeds")], text)
    assert torch.equal(flat[found.names.index("added_cond_kwargs.time_ids")], ids)


@pytest.mark.parametrize(
    "timestep",
    [
        7,
        7.0,
        torch.tensor(7),
        torch.tensor(7.0, dtype=torch.float64),
        torch.tensor([7]),
        torch.tensor([7, 7, 7], dtype=torch.int32),
    ],
    ids=["int", "float", "0-d", "0-d double", "[1]", "[B]"],
)
def test_every_spelling_of_a_timestep_is_one_float_per_sample(timestep: Any) -> None:
    flat = CONDITIONED.flatten((SAMPLE, timestep, CONDITION), {})[CONDITIONED.timestep_index]
    assert flat.dtype == torch.float32
    assert flat.tolist() == [7.0] * BATCH


def test_fractional_timesteps_are_kept() -> None:
    flat = CONDITIONED.flatten((SAMPLE, 0.25, CONDITION), {})
    assert flat[1].tolist() == [0.25] * BATCH


def test_the_example_call_may_spell_its_timestep_any_way() -> None:
    spelt = [signature_of(Denoiser(), (SAMPLE, t), {}) for t in (7, 7.0, torch.tensor(7), TIMES)]
    assert all(found == spelt[0] for found in spelt)
    assert spelt[0].ranks == (4, 1)


def test_forms_of_a_timestep_follow_what_is_given() -> None:
    def forms(timestep: Any) -> tuple[tuple[int, torch.dtype], ...]:
        return signature_of(Denoiser(), (SAMPLE, timestep), {}).forms

    floating, whole = torch.float32, torch.int64
    assert forms(TIMES.float()) == ((1, floating),)
    assert forms(TIMES) == ((1, floating), (1, whole))
    assert forms(0.5) == ((1, floating), (0, floating))
    assert forms(7) == ((1, floating), (1, whole), (0, floating), (0, whole))


def test_a_table_of_timesteps_gets_integers_and_no_fractions() -> None:
    found = signature_of(Denoiser(), (SAMPLE, 3), {}).with_timestep(1, torch.int64)
    assert found.flatten((SAMPLE, 5.0), {})[1].dtype == torch.int64
    with pytest.raises(CallError, match=r"timestep is 5\.5.*takes whole numbers"):
        found.flatten((SAMPLE, 5.5), {})


def test_one_timestep_for_all_samples_stays_one_number() -> None:
    found = signature_of(Denoiser(), (SAMPLE, 3), {}).with_timestep(0, torch.float32)
    assert found.flatten((SAMPLE, torch.tensor([5])), {})[1].shape == ()
    with pytest.raises(CallError, match="timestep has 3 values; this model takes one"):
        found.flatten((SAMPLE, TIMES), {})
    usual = [SAMPLE, torch.full((BATCH,), 4.0)]
    assert torch.equal(found.reformed(usual)[1], torch.tensor(4.0))


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "sigma"])
@pytest.mark.parametrize("value", [3, np.int64(3), np.float32(3), torch.tensor([3, 3, 3])])
def test_the_timestep_is_found_by_any_of_its_names(name: str, value: Any) -> None:
    class Model(nn.Module):
        forward = eval(f"lambda self, x, {name}: x")

    found = signature_of(Model(), (SAMPLE, value), {})
    assert found.timestep == name
    assert found.flatten((SAMPLE, value), {})[1].tolist() == [3.0] * BATCH


def test_an_image_called_t_is_no_timestep() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor: ...

    assert signature_of(Model(), (SAMPLE, SAMPLE), {}).timestep is None


def test_what_is_no_tensor_is_fixed_by_the_first_call() -> None:
    class Model(nn.Module):
        def forward(
            self, x: Tensor, scale: float = 1.0, mode: str = "a", extra: Any = None
        ) -> Tensor: ...

    first = signature_of(Model(), (SAMPLE,), {"extra": {"scale": 0.5, "image": [SAMPLE, None]}})
    assert first.constants == {"extra.scale": 0.5, "extra.image.1": None}
    same = {"extra": {"image": [SAMPLE, None], "scale": 0.5}}
    for more in ({}, {"scale": 1.0}, {"scale": 1, "mode": "a"}):
        assert len(first.flatten((SAMPLE,), same | more)) == 2
    for more, message in (
        ({"scale": 2.0}, r"scale is 2\.0, in the first calibration call it was 1\.0"),
        ({"mode": "b"}, "mode is 'b'"),
        ({"extra": {"scale": 0.7, "image": [SAMPLE]}}, r"extra\.scale is 0\.7"),
    ):
        with pytest.raises(CallError, match=message):
            first.flatten((SAMPLE,), same | more)


def test_arguments_beyond_the_named_ones() -> None:
    class Model(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor: ...

    found = signature_of(Model(), (SAMPLE, 3), {"text": CONDITION, "return_dict": False})
    assert found.names == ("args.0", "args.1", "text")
    assert found.timestep == "args.1"
    tensors = found.flatten((SAMPLE, 4), {"text": CONDITION})
    args, kwargs = found.call(tensors)
    assert torch.equal(args[0], SAMPLE)
    assert args[1].tolist() == [4.0] * BATCH
    assert set(kwargs) == {"text", "return_dict"}


def test_small_floats_keep_their_precision() -> None:
    sizes = torch.tensor([[1083.0, 1080.0]] * BATCH)
    found = signature_of(Denoiser().bfloat16(), (SAMPLE, 999, None, sizes), {})
    assert found.flatten((SAMPLE, 999, None, sizes), {})[2].dtype == torch.float32


def test_a_model_without_a_timestep_has_no_timestep_index() -> None:
    assert signature_of(nn.Conv2d(4, 4, 1), (SAMPLE,), {}).timestep_index is None


def test_floats_take_the_dtype_of_the_model_and_integers_and_timesteps_keep_theirs() -> None:
    labels = torch.tensor([1, 2, 3])
    call = {"encoder_hidden_states": CONDITION, "class_labels": labels}
    found = signature_of(Denoiser().bfloat16(), (SAMPLE, 999), call)
    dtypes = [t.dtype for t in found.flatten((SAMPLE, 999), call)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16, torch.int64]


@pytest.mark.parametrize("name", ["sd", "sdxl", "ldm"])
def test_unflatten_is_the_inverse_of_flatten(name: str) -> None:
    model, call = models.build(name), models.calls(name, n=1)[0]
    found = signature_of(model, (), call)
    tensors = found.flatten((), call)
    again = found.unflatten(tensors)
    assert set(again) == set(call)
    assert all(torch.equal(a, b) for a, b in zip(found.flatten((), again), tensors, strict=True))


def test_unflatten_rebuilds_dicts_and_tuples() -> None:
    found = signature(
        added_cond_kwargs={"a": SAMPLE, "b": CONDITION}, residuals=[SAMPLE, CONDITION]
    )
    call = found.unflatten(["x", "t", "a", "b", "r0", "r1"])  # type: ignore[list-item]
    assert call == {
        "sample": "x",
        "timestep": "t",
        "added_cond_kwargs": {"a": "a", "b": "b"},
        "residuals": ["r0", "r1"],
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((SAMPLE, torch.tensor([1, 2]), CONDITION), "timestep has 2 values for a batch of 3"),
        ((SAMPLE, 1), "lacks encoder_hidden_states"),
        ((SAMPLE, None, CONDITION), "lacks timestep"),
        ((SAMPLE, 1, CONDITION, TIMES), "has class_labels, unseen in the first"),
        ((SAMPLE, 1, CONDITION[0]), r"encoder_hidden_states has shape \(5, 16\); 3 dimensions"),
        ((SAMPLE[0], 1, CONDITION), r"sample has shape \(4, 8, 8\); 4 dimensions"),
        ((SAMPLE, 1, "a prompt"), "encoder_hidden_states is a str, .* it was a tensor"),
        ((SAMPLE, 1, 2.0), "encoder_hidden_states is a float"),
        ((SAMPLE, 1, object()), "'encoder_hidden_states' is a object; .*Leave it out"),
        ((SAMPLE, 1, CONDITION.long()), "encoder_hidden_states is torch.int64"),
        ((SAMPLE,) * 8, "8 positional arguments; forward takes sample, timestep"),
    ],
    ids=[
        "timestep count",
        "missing",
        "no timestep",
        "extra",
        "rank",
        "unbatched sample",
        "string",
        "number",
        "object",
        "kind",
        "too many",
    ],
)
def test_a_call_that_does_not_fit_is_refused(call: tuple[Any, ...], message: str) -> None:
    with pytest.raises(CallError, match=message):
        CONDITIONED.flatten(call, {})


def test_a_call_with_two_faults_names_both() -> None:
    with pytest.raises(CallError, match=r"lacks encoder_hidden_states and has class_labels"):
        CONDITIONED.flatten((SAMPLE, 1), {"class_labels": TIMES})


def test_an_unknown_argument_is_named_with_what_forward_takes() -> None:
    with pytest.raises(CallError, match=r"unknown argument 'promt'; forward takes sample, time"):
        CONDITIONED.flatten((SAMPLE, 1), {"promt": CONDITION})


def test_an_argument_given_twice_is_refused() -> None:
    with pytest.raises(CallError, match="'timestep' is given twice"):
        CONDITIONED.flatten((SAMPLE, 1), {"timestep": 2, "encoder_hidden_states": CONDITION})


@pytest.mark.parametrize("call", [{}, {"timestep": 3}, {"sample": torch.tensor(1.0)}])
def test_a_first_call_without_a_batched_tensor_is_refused(call: dict[str, Any]) -> None:
    with pytest.raises(CallError, match=r"holds no batched tensor.*dict or a tuple: sample"):
        signature_of(Denoiser(), (), call)


def test_bind_names_arguments_and_drops_return_dict() -> None:
    given = bind(("a", "b", "return_dict"), (1,), {"b": None, "return_dict": False})
    assert given == {"a": 1, "b": None}
