"""Uniform quantisation: q = clamp(round(x / scale) + zero_point), real = (q - zero_point) * scale.

Integers are signed: b bits span [-2^(b-1), 2^(b-1) - 1]. Rounding is half to even. Symmetric
quantisers above 4 bits give up the lowest integer, so that +max and -max are both exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def integer_range(bits: int, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest integer of b bits; narrow drops the smallest."""
    half = 2 ** (bits - 1)
    return (-half + 1 if narrow else -half), half - 1


def weight_range(bits: int) -> tuple[int, int]:
    """Integers a weight may take: [-127, 127] at 8 bit, [-8, 7] at 4 bit."""
    return integer_range(bits, narrow=bits > 4)


def affine_parameters(
    low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point that cover [low, high] and represent 0.0 exactly.

    Args:
        low, high: float tensors of equal shape, one range each.

    Returns:
        scale float32 > 0 and zero_point float32 with integer values, shaped like `low`.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    smallest, largest = integer_range(bits)
    if symmetric:
        bound = torch.maximum(-low, high)
        return _positive(bound / largest), torch.zeros_like(bound)
    scale = _positive((high - low) / (largest - smallest))
    zero = (smallest - torch.round(low / scale)).clamp(smallest, largest)
    return scale, zero


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, low: int, high: int) -> Tensor:
    """Integers, kept in float32, of a float tensor; scale and zero point broadcast."""
    return (torch.round(x.float() / scale) + zero_point).clamp(low, high)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """float32 values of integers."""
    return (q.float() - zero_point) * scale


def per_channel(values: Tensor, ndim: int, axis: int) -> Tensor:
    """[C] shaped to broadcast along `axis` of a tensor with `ndim` dimensions."""
    return values.view([-1 if d == axis else 1 for d in range(ndim)])


def _positive(scale: Tensor) -> Tensor:
    """A constant 0 tensor has range 0; any scale represents it, 1 is as good as another."""
    return torch.where(scale > _TINY, scale, torch.ones_like(scale))
