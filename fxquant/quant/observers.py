"""Observers find the range of what passes an edge.

Each is a small class with `update(x, extremes)` and `range() -> (low, high)`; OBSERVERS names them.
An `ObservedEdge` is the module that sits in the observed graph: it returns its input and keeps one
observer per row of the activation table. NaN and infinity have no place in a range: an edge shows
its observers the finite values and counts the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fxquant.errors import RecipeError, near
from fxquant.quant.search import pnorm_range
from fxquant.quant.spec import QuantSpec

_MOMENTUM = 0.9
_PERCENTILE = 0.9999
_PERCENTILE_SAMPLES = 1 << 20


class Observer(Protocol):
    """Collects a range."""

    def update(self, x: Tensor, extremes: tuple[float, float]) -> None:
        """See one batch of finite values, any shape, whose lowest and highest are known."""

    def range(self) -> tuple[float, float]:
        """Lowest and highest value to represent."""


class MinMax:
    """Everything seen."""

    def __init__(self, spec: QuantSpec):
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor, extremes: tuple[float, float]) -> None:
        self.low, self.high = min(self.low, extremes[0]), max(self.high, extremes[1])

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class _Averaged:
    """Exponential moving average, 0.9 old + 0.1 new, of each batch's range (EDA-DM's rule)."""

    def __init__(self, spec: QuantSpec):
        self.spec = spec
        self.mean: tuple[float, float] | None = None

    def batch_range(self, x: Tensor, extremes: tuple[float, float]) -> tuple[float, float]:
        return extremes

    def update(self, x: Tensor, extremes: tuple[float, float]) -> None:
        new = self.batch_range(x, extremes)
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

    def batch_range(self, x: Tensor, extremes: tuple[float, float]) -> tuple[float, float]:
        flat = x.reshape(-1).float()
        flat = flat[:: max(1, -(-flat.numel() // _PERCENTILE_SAMPLES))]
        levels = torch.tensor([1 - _PERCENTILE, _PERCENTILE], device=x.device)
        low, high = torch.quantile(flat, levels).tolist()
        return low, high


class PNorm(_Averaged):
    """Moving average of the ranges that minimise mean |x - x^|^2.4 of each batch (EDA-DM)."""

    def batch_range(self, x: Tensor, extremes: tuple[float, float]) -> tuple[float, float]:
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


class _Spread(NamedTuple):
    """The finite values of a batch, by leading index."""

    finite: Tensor | None
    """Which values are; None if all."""
    lows: Tensor
    highs: Tensor
    """float32 [N] on the CPU; inf and -inf where nothing is finite."""


class ObservedEdge(nn.Module):
    """Identity that watches: one observer per group of timesteps.

    forward(x, group int64 [B]) -> x; sample b counts for table row group[b]. Of x [B * k, ...] k
    parts belong to each sample. Whether a sample's lie side by side, or a whole batch after the
    other, no shape tells: each part counts for the rows of both. Another x, and one that carries no
    sample, counts for every row of the call: all its samples read it.

    Args:
        has_samples: the first dimension is one of samples.

    Attributes:
        seen: batches with a finite value, by row.
        values, dropped: how many there were in all, and how many of them not finite.
        widths: of the range of each sample in the order of the calls, zero included.
    """

    def __init__(self, spec: QuantSpec, groups: int, has_samples: bool = True):
        super().__init__()
        self.spec = spec
        self.has_samples = has_samples
        self.rows = [OBSERVERS[spec.observer](spec) for _ in range(groups)]
        self.seen = [0] * groups
        self.values = self.dropped = 0
        self.widths: list[float] = []

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        if x.numel():
            self._see(x.detach().reshape(x.shape or (1,)), group)
        return x

    def _see(self, x: Tensor, group: Tensor) -> None:
        spread = _spread(x)
        self.values += x.numel()
        if spread.finite is not None:
            self.dropped += x.numel() - int(spread.finite.sum())
        shared = not self.has_samples or x.shape[0] % group.shape[0] != 0
        self.widths += _widths(spread, 1 if shared else group.shape[0]) * (
            group.shape[0] if shared else 1
        )
        for row in group.unique().tolist():
            mine = group == row
            self._update(row, x, spread, None if shared or mine.all() else _parts(mine, len(x)))

    def _update(self, row: int, x: Tensor, spread: _Spread, chosen: Tensor | None) -> None:
        finite, lows, highs = spread
        if chosen is not None:
            x, lows, highs = x[chosen], lows[chosen.cpu()], highs[chosen.cpu()]
            finite = None if finite is None else finite[chosen]
        low, high = float(lows.min()), float(highs.max())
        if low <= high:
            self.rows[row].update(x if finite is None else x[finite], (low, high))
            self.seen[row] += 1


def _spread(x: Tensor) -> _Spread:
    lows, highs = _extremes(x, x)
    if bool(torch.isfinite(lows).all()) and bool(torch.isfinite(highs).all()):
        return _Spread(None, lows, highs)
    finite = torch.isfinite(x)
    low, high = x.masked_fill(~finite, float("inf")), x.masked_fill(~finite, float("-inf"))
    return _Spread(finite, *_extremes(low, high))


def _extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """By leading index, in one pass each; NaN where there is one."""
    dims = tuple(range(1, low.ndim))
    if not dims:
        return low.float().cpu(), high.float().cpu()
    return low.amin(dims).float().cpu(), high.amax(dims).float().cpu()


def _widths(spread: _Spread, samples: int) -> list[float]:
    """Of the range of each sample, zero included; 0 where nothing is finite."""
    low = spread.lows.clamp(max=0.0).view(samples, -1).amin(1)
    high = spread.highs.clamp(min=0.0).view(samples, -1).amax(1)
    return (high - low).tolist()


def _parts(chosen: Tensor, count: int) -> Tensor:
    """Which of ``count`` parts may be of these samples: in one order or the other."""
    k = count // len(chosen)
    return chosen if k == 1 else chosen.repeat_interleave(k) | chosen.repeat(k)
