"""AdaRound (arXiv 2004.10568): learn for every weight whether to round it down or up.

The soft weight is scale * clamp(floor(w / scale) + h(alpha)) with the rectified sigmoid
h = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1). alpha starts where h is the fractional part, so training
starts at the float weight; a regulariser drives h to 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.quant.uniform import per_channel, weight_range

_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched to this interval, then clamped to [0, 1]


@dataclass(frozen=True)
class Rounding:
    """One weight whose rounding is learned.

    Attributes:
        down: the weight in steps, rounded down: float [N, ...].
        fraction: what rounding down took away, in [0, 1).
        step: step size, shaped to broadcast.
        low, high: the integers allowed.
        dtype: of the weight.
    """

    down: Tensor
    fraction: Tensor
    step: Tensor
    low: int
    high: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bits: int) -> Rounding:
        """Of a float weight [N, ...] with a scale per output channel, [N]."""
        step = per_channel(scale, weight.ndim, 0)
        ratio = weight.detach().to(step.dtype) / step
        down = ratio.floor()
        return cls(down, ratio - down, step, *weight_range(bits), weight.dtype)

    def initial_alpha(self) -> Tensor:
        """alpha with h(alpha) = fraction: training starts at the float weight."""
        return torch.logit((self.fraction - _LOW) / (_HIGH - _LOW))

    def soft(self, alpha: Tensor) -> Tensor:
        """The weight in training, differentiable in alpha."""
        return self._weight(rectified_sigmoid(alpha))

    def hard(self, alpha: Tensor) -> Tensor:
        """The weight after training, on the integer grid: alpha >= 0 rounds up."""
        return self._weight((alpha >= 0).to(self.down.dtype))

    def nearest(self) -> Tensor:
        """The weight rounded to nearest, half to even, as without training."""
        return self._weight((self.down + self.fraction).round() - self.down)

    def _weight(self, up: Tensor) -> Tensor:
        return ((self.down + up).clamp(self.low, self.high) * self.step).to(self.dtype)


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h in [0, 1]."""
    return (torch.sigmoid(alpha) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def regulariser(alpha: Tensor, sharpness: float) -> Tensor:
    """sum(1 - |2 h - 1|^sharpness): 0 where every h is 0 or 1."""
    return (1 - (2 * rectified_sigmoid(alpha) - 1).abs().pow(sharpness)).sum()


def settled(alpha: Tensor, tolerance: float = 0.01) -> Tensor:
    """Where h lies within a tolerance of 0 or 1: bool, shaped like alpha."""
    h = rectified_sigmoid(alpha)
    return (h < tolerance) | (h > 1 - tolerance)
