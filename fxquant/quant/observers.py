"""Observers find the range of what passes an edge.

Each is a small class with `update(x)` and `range() -> (low, high)`; OBSERVERS names them. An
`ObservedEdge` is the module that sits in the observed graph: it returns its input and keeps one
observer per row of the activation table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fxquant.errors import RecipeError, near
from fxquant.quant.fake_quant import along_samples
from fxquant.quant.search import pnorm_range
from fxquant.quant.spec import QuantSpec

_MOMENTUM = 0.9
_PERCENTILE = 0.9999
_PERCENTILE_SAMPLES = 1 << 20


class Observer(Protocol):
    """Collects a range."""

    def update(self, x: Tensor) -> None:
        """See one batch of values, any shape."""

    def range(self) -> tuple[float, float]:
        """Lowest and highest value to represent."""


class MinMax:
    """Everything seen."""

    def __init__(self, spec: QuantSpec):
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class _Averaged:
    """Exponential moving average, 0.9 old + 0.1 new, of each batch's range (EDA-DM's rule)."""

    def __init__(self, spec: QuantSpec):
        self.spec = spec
        self.mean: tuple[float, float] | None = None

    def batch_range(self, x: Tensor) -> tuple[float, float]:
        low, high = torch.aminmax(x)
        return float(low), float(high)

    def update(self, x: Tensor) -> None:
        new = self.batch_range(x)
        if self.mean is None:
            self.mean = new
        else:
            old_low, old_high = self.mean
            keep = _MOMENTUM
            self.mean = keep * old_low + (1 - keep) * new[0], keep * old_high + (1 - keep) * new[1]

    def range(self) -> tuple[float, float]:
        assert self.mean is not None, "range() of an observer that saw nothing"
        return self.mean


class MovingAverage(_Averaged):
    """Moving average of the batches' minima and maxima."""


class Percentile(_Averaged):
    """Moving average of the batches' 0.01 and 99.99 percentiles (of at most 2^20 values each)."""

    def batch_range(self, x: Tensor) -> tuple[float, float]:
        flat = x.reshape(-1).float()
        flat = flat[:: max(1, -(-flat.numel() // _PERCENTILE_SAMPLES))]
        levels = torch.tensor([1 - _PERCENTILE, _PERCENTILE], device=x.device)
        low, high = torch.quantile(flat, levels).tolist()
        return low, high


class PNorm(_Averaged):
    """Moving average of the ranges that minimise mean |x - x^|^2.4 of each batch (EDA-DM)."""

    def batch_range(self, x: Tensor) -> tuple[float, float]:
        low, high = pnorm_range(x.reshape(1, -1), self.spec.bits, self.spec.symmetric)
        return float(low), float(high)


OBSERVERS: dict[str, Callable[[QuantSpec], Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "pnorm": PNorm,
}


def check_observer(name: str) -> None:
    """Raise RecipeError for an unknown observer."""
    if name not in OBSERVERS:
        raise RecipeError(f"unknown observer {name!r}.{near(name, OBSERVERS)}")


class ObservedEdge(nn.Module):
    """Identity that watches: one observer per group of timesteps.

    forward(x [B, ...], group int64 [B]) -> x; sample b counts for table row group[b].
    """

    def __init__(self, spec: QuantSpec, groups: int):
        super().__init__()
        self.spec = spec
        self.rows = [OBSERVERS[spec.observer](spec) for _ in range(groups)]
        self.seen = [0] * groups

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        if len(self.rows) == 1:
            self._update(0, x)
        else:
            rows = along_samples(group, x)
            for row in group.unique().tolist():
                self._update(row, x[rows == row])
        return x

    def _update(self, row: int, x: Tensor) -> None:
        self.rows[row].update(x.detach())
        self.seen[row] += 1
