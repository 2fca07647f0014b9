"""Reads a calibration loader: any iterable of UNet calls, checked one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import CallError, LoaderError
from fxquant.graph.signature import Signature, signature_of


def read_calls(loader: Iterable[Any], model: nn.Module) -> tuple[Signature, list[list[Tensor]]]:
    """All calls of the loader as flat tensors in graph order.

    Args:
        loader: yields calls, each a dict of forward's arguments or a tuple of its positional ones.
            Lists, DataLoaders and one-shot generators work alike; it is iterated once.

    Returns:
        The signature of the first call, and every call's tensors.

    Raises:
        LoaderError: not iterable, empty, or it raised midway (the cause is chained).
        CallError: a call does not fit; the message says which and why.
    """
    signature: Signature | None = None
    calls: list[list[Tensor]] = []
    for number, item in enumerate(_items(loader)):
        try:
            args, kwargs = as_arguments(item)
            signature = signature or signature_of(model, args, kwargs)
            tensors = signature.flatten(args, kwargs)
            _check_values(signature, tensors)
        except CallError as error:
            raise CallError(f"calibration call {number}: {error}") from error
        calls.append(tensors)
    if signature is None:
        raise LoaderError(
            "the calibration loader yielded nothing. If it is a generator, it may have been used "
            "up; fxquant.calibration.record takes the calls of a sampler run"
        )
    return signature, calls


def as_arguments(item: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """(args, kwargs) of one loader item."""
    if isinstance(item, Mapping):
        return (), item
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    raise CallError(f"expected a dict or a tuple of arguments, got a {type(item).__name__}")


def timesteps_of(signature: Signature, calls: Iterable[Sequence[Tensor]]) -> list[float]:
    """Every sample's timestep, in order; empty for a model without one."""
    index = signature.timestep_index
    return [] if index is None else [t for call in calls for t in call[index].tolist()]


def _items(loader: Iterable[Any]) -> Iterator[Any]:
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise LoaderError(
            f"the calibration loader is a {type(loader).__name__}, which cannot be iterated; "
            "give a list, a DataLoader or a generator of UNet calls"
        )
    iterator: Iterator[Any] | None = None
    number = 0
    while True:
        try:
            iterator = iter(loader) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise LoaderError(
                f"the calibration loader raised {type(error).__name__} after {number} calls: "
                f"{error}"
            ) from error
        yield item
        number += 1


def _check_values(signature: Signature, tensors: Sequence[Tensor]) -> None:
    if not tensors[0].numel():
        raise CallError(f"{signature.names[0]} is empty: {list(tensors[0].shape)}")
    for name, tensor in zip(signature.names, tensors, strict=True):
        if (
            tensor.device.type != "meta"
            and tensor.is_floating_point()
            and not torch.isfinite(tensor).all()
        ):
            raise CallError(
                f"{name} holds NaN or infinity; ranges taken from it would be meaningless"
            )
