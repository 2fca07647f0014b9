"""What may be a calibration loader, and how each unusable one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxquant
from fxquant.calibration.calls import as_arguments, read_calls, timesteps_of
from fxquant.errors import CallError, CaptureError, LoaderError
from tests import models

TOY = models.build("toy")
CALLS = models.calls("toy", n=3, batch=2)
TUPLES = [(c["sample"], c["timestep"], c["encoder_hidden_states"]) for c in CALLS]


class Batches:
    """Like a DataLoader: iterable many times, each batch a list."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([list(t) for t in TUPLES])


class Indexed:
    """The sequence protocol alone, as a map-style dataset of calls has it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return CALLS[index]


def generator() -> Iterator[dict[str, Any]]:
    yield from CALLS


def data_loader() -> DataLoader[Any]:
    return DataLoader(
        [{k: v if k == "timestep" else v[0] for k, v in c.items()} for c in CALLS], batch_size=2
    )


@pytest.mark.parametrize(
    "loader",
    [list(CALLS), tuple(CALLS), generator(), iter(CALLS), TUPLES, Batches(), Indexed()],
    ids=["list", "tuple", "generator", "iterator", "tuples", "batches", "indexed"],
)
def test_every_kind_of_loader_gives_the_same_calls(loader: Any) -> None:
    signature, calls = read_calls(loader, TOY)
    assert signature.names == ("sample", "timestep", "encoder_hidden_states")
    assert len(calls) == 3
    for tensors, call in zip(calls, CALLS, strict=True):
        assert torch.equal(tensors[0], call["sample"])
        assert tensors[1].tolist() == [float(call["timestep"])] * 2
        assert torch.equal(tensors[2], call["encoder_hidden_states"])


def test_a_data_loader_batches_calls_with_their_timesteps() -> None:
    signature, calls = read_calls(data_loader(), TOY)
    assert [len(c[0]) for c in calls] == [2, 1]
    assert timesteps_of(signature, calls) == [999.0, 500.0, 0.0]


def test_calls_may_differ_in_batch_and_size() -> None:
    mixed = [CALLS[0], models.calls("toy", n=1, batch=5)[0]]
    mixed.append({**CALLS[1], "sample": torch.ones(2, 4, 12, 8)})
    _, calls = read_calls(mixed, TOY)
    assert [tuple(c[0].shape) for c in calls] == [(2, 4, 8, 8), (5, 4, 8, 8), (2, 4, 12, 8)]


def test_a_one_shot_loader_is_iterated_once() -> None:
    started = []

    def counted() -> Iterator[dict[str, Any]]:
        started.append(1)
        yield from CALLS

    class Loader:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return counted()

    read_calls(Loader(), TOY)
    assert started == [1]


def test_a_model_without_timestep_has_no_timesteps() -> None:
    signature, calls = read_calls([(torch.ones(2, 4, 8, 8),)], nn.Conv2d(4, 4, 1))
    assert timesteps_of(signature, calls) == []


@pytest.mark.parametrize("loader", [[], (), iter(())], ids=["list", "tuple", "used up"])
def test_an_empty_loader_is_refused(loader: Any) -> None:
    with pytest.raises(LoaderError, match=r"yielded nothing.*may have been used up"):
        read_calls(loader, TOY)


@pytest.mark.parametrize("loader", [5, None, TOY], ids=["number", "None", "module"])
def test_what_cannot_be_iterated_is_refused_by_its_type(loader: Any) -> None:
    with pytest.raises(LoaderError, match=f"is a {type(loader).__name__}, which cannot be iter"):
        read_calls(loader, TOY)


def test_a_loader_that_raises_midway_is_refused_with_the_cause() -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield from CALLS[:2]
        raise OSError("disk gone")

    with pytest.raises(LoaderError, match="raised OSError after 2 calls: disk gone") as caught:
        read_calls(failing(), TOY)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("error", [RuntimeError("no workers"), TypeError("a bug in it")])
def test_a_loader_that_cannot_start_is_refused_with_the_cause(error: Exception) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            raise error

    with pytest.raises(LoaderError, match=f"raised {type(error).__name__} after 0 calls") as caught:
        read_calls(Loader(), TOY)
    assert caught.value.__cause__ is error


def changed(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**CALLS[1], **changes}


BAD = torch.full((2, 7, 16), float("nan"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (changed(encoder_hidden_states=BAD), "encoder_hidden_states holds NaN or infinity"),
        (changed(sample=torch.full((2, 4, 8, 8), torch.inf)), "sample holds NaN or infinity"),
        (changed(timestep=float("nan")), "timestep holds NaN or infinity"),
        (changed(sample=torch.ones(4, 8, 8)), r"sample has shape \(4, 8, 8\); 4 dimensions"),
        (changed(timestep=torch.ones(3)), "timestep has 3 values for a batch of 2"),
        (changed(class_labels=torch.ones(2)), "unknown argument 'class_labels'; forward takes"),
        (changed(encoder_hidden_states=None), "lacks encoder_hidden_states"),
        (lambda: TUPLES[1][:2], "lacks encoder_hidden_states"),
        (lambda: (*TUPLES[1], True, 1), "5 positional arguments; forward takes sample"),
        (lambda: torch.ones(2), "expected a dict or a tuple of arguments, got a Tensor"),
        (lambda: "sample", "expected a dict or a tuple of arguments, got a str"),
    ],
    ids=[
        "NaN condition",
        "infinite sample",
        "NaN timestep",
        "rank",
        "timesteps",
        "unknown key",
        "None",
        "short tuple",
        "long tuple",
        "tensor",
        "string",
    ],
)
def test_a_call_that_does_not_fit_is_refused_with_its_number(
    item: Callable[[], Any], message: str
) -> None:
    with pytest.raises(CallError, match=f"calibration call 1: .*{message}") as caught:
        read_calls([CALLS[0], item(), CALLS[2]], TOY)
    assert not isinstance(caught.value, LoaderError)


def test_the_first_call_is_number_0() -> None:
    with pytest.raises(CallError, match=r"calibration call 0: .*unknown argument 'latents'"):
        read_calls([{"latents": torch.ones(2)}], TOY)


def test_a_single_call_instead_of_a_list_of_them_is_refused() -> None:
    with pytest.raises(CallError, match=r"calibration call 0: expected a dict .* got a str"):
        read_calls(CALLS[0], TOY)


def test_an_empty_batch_is_refused() -> None:
    empty = {**{k: v[:0] for k, v in CALLS[0].items() if k != "timestep"}, "timestep": 3}
    with pytest.raises(CallError, match=r"calibration call 0: sample is empty: \[0, 4, 8, 8\]"):
        read_calls([empty], TOY)


def test_tensors_on_the_meta_device_have_no_values_to_check() -> None:
    model = nn.Conv2d(4, 4, 1, device="meta")
    _, calls = read_calls([(torch.empty(2, 4, 8, 8, device="meta"),)], model)
    assert calls[0][0].device.type == "meta"


def test_arguments_of_a_mapping_and_of_a_sequence() -> None:
    assert as_arguments({"a": 1}) == ((), {"a": 1})
    assert as_arguments([1, 2]) == as_arguments((1, 2)) == ((1, 2), {})


def test_calls_that_differ_in_channels_or_kind_are_refused():
    model = models.build("toy")
    good = models.calls("toy", 1, 2, 0)[0]
    wide = {**good, "sample": torch.randn(2, 5, 8, 8)}
    with pytest.raises(CaptureError, match=r"sample has shape \(2, 5, 8, 8\)"):
        fxquant.compile(model, [good, wide], progress=False)
    whole = {**good, "encoder_hidden_states": good["encoder_hidden_states"].long()}
    with pytest.raises(CallError, match=r"call 1: encoder_hidden_states is torch.int64"):
        read_calls([good, whole], model)
    with pytest.raises(CaptureError, match=r"could not trace ToyUNet .*: RuntimeError: Input type"):
        fxquant.compile(model, [{**good, "sample": good["sample"].int()}], progress=False)
