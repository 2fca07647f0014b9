"""Fake quantisation: round to the grid and back, in float, with straight-through gradients.

Rounding passes gradients through; clamping stops them outside the range. What remains for the
scale is the gradient of LSQ (learned step size quantisation, arXiv 1902.08153) without its scaling.
"""

from __future__ import annotations

from torch import Tensor

from fxquant.quant.uniform import integer_range, per_channel, weight_range


def round_straight_through(x: Tensor) -> Tensor:
    """round(x), half to even, with gradient 1."""
    return x + (x.round() - x).detach()


def along_samples(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, [B], shaped to broadcast over x.

    Of x [B * k, ...] k parts belong to each sample, side by side. Any other x carries no sample,
    and all read the same: it takes the first sample's value.
    """
    parts, rest = divmod(x.shape[0], values.shape[0]) if x.ndim else (0, 1)
    if rest:
        return values[0]
    values = values if parts == 1 else values.repeat_interleave(parts)
    return values.view(-1, *[1] * (x.ndim - 1))


def fake_quantize(x: Tensor, row: Tensor, index: int, bits: int) -> Tensor:
    """An activation as its integers would represent it.

    Args:
        x: [B, ...] float, or [B * k, ...] where a model folds k parts of each sample together, or
            of another shape where it carries no sample; see `along_samples`.
        row: [n, 2] scales and zero points, or [B, n, 2] with a row per sample.
        index: quantiser, 0 to n-1.

    Returns:
        x's shape and dtype; gradients flow to x and to the scales in `row`.
    """
    low, high = integer_range(bits)
    scale, zero = row[..., index, 0], row[..., index, 1]
    if row.ndim == 3:
        scale, zero = along_samples(scale, x), along_samples(zero, x)
    q = (round_straight_through(x.float() / scale) + zero).clamp(low, high)
    return ((q - zero) * scale).to(x.dtype)


fake_quantize.keeps_outline = True  # type: ignore[attr-defined] # its example value is its input's


def fake_quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """A weight as its integers would represent it.

    Args:
        weight: [N, ...] float, output channels first.
        scale: [N] float32, one per output channel, or [1] for all.
    """
    low, high = weight_range(bits)
    step = per_channel(scale, weight.ndim, 0)
    q = round_straight_through(weight.float() / step).clamp(low, high)
    return (q * step).to(weight.dtype)


fake_quantize_weight.keeps_outline = True  # type: ignore[attr-defined]
