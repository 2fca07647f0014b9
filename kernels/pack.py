"""Weights in a kernel's own order, made once and kept as long as the weight they come from.

Packed weights are opaque tensors that cannot be copied or saved, so no module holds them: they
live here, weakly keyed by the canonical weight and by the form that a kernel wants it in. A weight
that is changed in place, or whose `.data` is another tensor, is packed again. A view is another
weight: pass the tensor itself. Weights made in inference mode count no changes, so what is made of
them is not kept. What is written through `.data` is counted by nobody:
`torch.autograd.graph.increment_version` tells.

Whoever asks first may be under a dispatch mode that takes what is made for its own, as a recording
of steps does; packed weights outlive it, so they are made where no mode sees them.

A GPU makes packed weights on the stream of whoever asks first, and they are not handed out before
that stream is done: who asks next may be on another.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.errors import BackendError
from fxquant.kernels import calls

log = logging.getLogger(__name__)


class Packed(NamedTuple):
    """A packed weight, and the integers that go with it: sums of channels, or zero points."""

    weight: Tensor
    sums: Tensor


class _State(NamedTuple):
    """Another one whenever the weight's numbers may be others."""

    version: int
    address: int


class _Entry(NamedTuple):
    state: _State
    memory: object
    """The weight's, held so that no other weight can be at its address."""
    forms: dict[Hashable, Packed]


_lock = threading.RLock()
_entries = WeakIdKeyDictionary()


def packed(weight: Tensor, make: Callable[[], Packed], form: Hashable = "") -> Packed:
    """What ``make`` made of ``weight``: called at most once per form and state of the weight.

    Raises BackendError if it has to be made while a CUDA graph is captured: it would be part of the
    graph, and empty until that is replayed.
    """
    with _lock:
        if weight.is_inference():
            _warn_uncounted()
            return _made(weight, make)
        state = _State(weight._version, weight.data_ptr())
        entry: _Entry | None = _entries.get(weight)
        if entry is None or entry.state != state:
            entry = _Entry(state, weight.untyped_storage(), {})
            _entries[weight] = entry
        if form not in entry.forms:
            entry.forms[form] = _made(weight, make)
        return entry.forms[form]


@functools.cache
def _warn_uncounted() -> None:
    """Once."""
    log.warning(
        "a weight was made in inference mode, which counts no changes: it is prepared anew in "
        "every step. Load weights outside of torch.inference_mode() to avoid this."
    )


def _made(weight: Tensor, make: Callable[[], Packed]) -> Packed:
    with _unseen():
        made = _on_gpu(weight, make) if weight.is_cuda else make()
    if not all(map(_is_lasting, made)):
        raise BackendError("a packed weight lies in memory that is used for something else, too")
    return made


@contextmanager
def _unseen() -> Iterator[None]:
    """Outside of every mode and recording; what is made counts its changes."""
    no_function_mode: Any = torch._C.DisableTorchFunction()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _disable_current_modes(),
        no_function_mode,
        calls.written_down(None),
    ):
        yield


def _is_lasting(made: Tensor) -> bool:
    """Did PyTorch allocate it? Memory of others, like an arena's, cannot be resized."""
    return made.layout != torch.strided or made.untyped_storage().resizable()


def _on_gpu(weight: Tensor, make: Callable[[], Packed]) -> Packed:
    with torch.cuda.device(weight.device):
        if torch.cuda.is_current_stream_capturing():
            raise BackendError(
                "a CUDA graph cannot record how a weight is prepared for its kernel: run the model "
                "once before the capture"
            )
        made = make()
        torch.cuda.current_stream().synchronize()
    return made


def count() -> int:
    """How many packed weights are alive."""
    with _lock:
        return len(_entries)
