"""Weights in a kernel's own order, made once and kept as long as the weight they come from.

Packed weights are opaque tensors that cannot be copied or saved, so no module holds them: they
live here, weakly keyed by the canonical weight and by the form that a kernel wants it in. A weight
that is changed in place is packed again. A view is another weight: pass the tensor itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


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
    """What ``make`` made of ``weight``: called at most once per form and state of the weight."""
    version = 0 if weight.is_inference() else weight._version
    with _lock:
        entry: _Entry | None = _entries.get(weight)
        if entry is None or entry.version != version:
            entry = _Entry(version, {})
            _entries[weight] = entry
        if form not in entry.forms:
            entry.forms[form] = make()
        return entry.forms[form]


def count() -> int:
    """How many packed weights are alive."""
    with _lock:
        return len(_entries)
