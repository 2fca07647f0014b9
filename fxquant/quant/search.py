"""Range search: the clipping range that minimises mean |x - x^|^p (METHOD: EDA-DM, p = 2.4).

Coarse to fine: 20 candidate fractions of the full range, then 10 around the best one. This finds
the published 100-candidate optimum to within half a percent of the range at a third of the cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.quant.uniform import (
    affine_parameters,
    dequantize,
    integer_range,
    quantize,
    weight_range,
)

P_NORM = 2.4
_COARSE = 20
_FINE = 10
_CHUNK_ELEMENTS = 1 << 22


def pnorm_range(x: Tensor, bits: int, symmetric: bool, p: float = P_NORM) -> tuple[Tensor, Tensor]:
    """Best range per row.

    Args:
        x: [R, K] float, one range for each row.

    Returns:
        low, high: float32 [R].
    """
    x = x.float()
    low, high = x.amin(1).clamp(max=0.0), x.amax(1).clamp(min=0.0)
    smallest, largest = integer_range(bits)

    def error(fraction: Tensor) -> Tensor:
        scale, zero = affine_parameters(low * fraction, high * fraction, bits, symmetric)
        return _pnorm_error(x, scale, zero, smallest, largest, p)

    best = _coarse_to_fine(error, x.shape[0], x.device)
    return low * best, high * best


def pnorm_weight_scale(weight: Tensor, bits: int, p: float = P_NORM) -> Tensor:
    """Best symmetric scale per output channel: weight [N, ...] -> float32 [N]."""
    flat = weight.detach().float().flatten(1)
    rows = max(1, _CHUNK_ELEMENTS // flat.shape[1])
    return torch.cat([_weight_scale(part, bits, p) for part in flat.split(rows)])


def absmax_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale per output channel that represents the largest weight exactly: [N, ...] -> [N]."""
    bound = weight.detach().float().flatten(1).abs().amax(1)
    scale = bound / weight_range(bits)[1]
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _weight_scale(x: Tensor, bits: int, p: float) -> Tensor:
    smallest, largest = weight_range(bits)
    full = absmax_weight_scale(x, bits)

    def error(fraction: Tensor) -> Tensor:
        return _pnorm_error(x, full * fraction, torch.zeros_like(full), smallest, largest, p)

    return full * _coarse_to_fine(error, x.shape[0], x.device)


def _coarse_to_fine(error: Callable[[Tensor], Tensor], rows: int, device: torch.device) -> Tensor:
    """Fraction of the full range with the least error, per row; error maps [R] to [R]."""
    best = torch.ones(rows, device=device)
    least = error(best)
    for step, around in ((1 / _COARSE, None), (1 / (_COARSE * _FINE), "best")):
        centre = best if around else torch.zeros_like(best)
        offsets = range(-_FINE, _FINE + 1) if around else range(1, _COARSE)
        for k in offsets:
            fraction = (centre + k * step).clamp(1e-3, 1.0)
            found = error(fraction)
            better = found < least
            best, least = torch.where(better, fraction, best), torch.where(better, found, least)
    return best


def _pnorm_error(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, p: float) -> Tensor:
    scale, zero = scale[:, None], zero[:, None]
    restored = dequantize(quantize(x, scale, zero, low, high), scale, zero)
    return (x - restored).abs_().pow_(p).mean(1)
