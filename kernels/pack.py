"""Weights in a kernel's own order, made once and kept as long as the weight they come from.

Packed weights are opaque tensors that cannot be copied or saved, so no module holds them: they
live here, weakly keyed by the canonical weight. A weight that is changed in place is packed
again. A view is another weight: pass the tensor itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Packed(NamedTuple):
    """A packed weight, and the zero points ``[N]`` (all 0) that go with it."""

    weight: Tensor
    zero_points: Tensor


class _Entry(NamedTuple):
    version: int
    packed: Packed


_lock = threading.RLock()
_entries = WeakIdKeyDictionary()


def packed(weight: Tensor, make: Callable[[], Packed]) -> Packed:
    """What ``make`` made of ``weight``; it is called at most once per state of the weight."""
    version = 0 if weight.is_inference() else weight._version
    with _lock:
        entry: _Entry | None = _entries.get(weight)
        if entry is None or entry.version != version:
            entry = _Entry(version, make())
            _entries[weight] = entry
        return entry.packed


def count() -> int:
    """How many packed weights are alive."""
    with _lock:
        return len(_entries)
