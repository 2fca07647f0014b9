"""Weights in a kernel's own order, made once and kept as long as the weight they come from.

Packed weights are opaque tensors that cannot be copied or saved, so no module holds them: they
live here, weakly keyed by the canonical weight and by the form that a kernel wants it in. A weight
that is changed in place is packed again. A view is another weight: pass the tensor itself.

A GPU makes packed weights on the stream of whoever asks first, and they are not handed out before
that stream is done: who asks next may be on another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.errors import BackendError


class Packed(NamedTuple):
    """A packed weight, and the integers that go with it: sums of channels, or zero points."""

    weight: Tensor
    sums: Tensor


class _Entry(NamedTuple):
    version: int
    forms: dict[Hashable, Packed]


_lock = threading.RLock()
_entries = WeakIdKeyDictionary()


def packed(weight: Tensor, make: Callable[[], Packed], form: Hashable = "") -> Packed:
    """What ``make`` made of ``weight``: called at most once per form and state of the weight.

    Raises BackendError if it has to be made while a CUDA graph is captured: it would be part of the
    graph, and empty until that is replayed.
    """
    version = 0 if weight.is_inference() else weight._version
    with _lock:
        entry: _Entry | None = _entries.get(weight)
        if entry is None or entry.version != version:
            entry = _Entry(version, {})
            _entries[weight] = entry
        if form not in entry.forms:
            entry.forms[form] = _on_gpu(weight, make) if weight.is_cuda else make()
        return entry.forms[form]


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
