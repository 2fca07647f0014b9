"""Every op in plain torch: the truth that kernels are tested against, and their fallback.

An activation integer q in [-128, 127] is stored as int8, or as uint8 holding q + 128.
``row`` is float32 ``[n, 2]``: scale and zero point of activation quantiser i;
real = (q - zero_point) * scale. Rounding is half to even, division is a true float32 division.
Integer sums are exact (computed in float64, where every partial sum is an integer below 2^53);
what follows them is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels import layout
from fxquant.kernels.int4 import unpacked

GATED = {"geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Activations of a linear that multiply half of its outputs by the activated other half."""


def quantize(
    x: Tensor, row: Tensor, index: int, bits: int, activation: str, dtype: torch.dtype
) -> Tensor:
    """Float ``x`` of any shape -> its integers, after ``activation``."""
    return layout.image(_quantized(_activated(x.float(), activation), row, index, bits, dtype))


def linear(
    x: Tensor,
    row: Tensor,
    x_index: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation: str,
    residual: Tensor | None,
    out_index: int,
    out_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Integers ``[..., K]`` -> ``activation(x @ weight.T + bias) + residual``, ``[..., N]``.

    ``geglu`` and ``geglu_tanh`` give half as many outputs, and take no residual.
    """
    sums = accumulate_linear(x, row, x_index, weight, weight_bits)
    y = sums.float() * (row[x_index, 0] * weight_scale)
    if bias is not None:
        y = y + bias.float()
    if activation in GATED:
        if residual is not None:
            raise ValueError(f"{activation} takes no residual")
        y, activation = gated(y, activation), "none"
    return finish(y, activation, residual, row, out_index, out_bits, out_dtype).contiguous()


def conv2d(
    x: Tensor,
    row: Tensor,
    x_index: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channel_add: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_index: int,
    out_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Integers ``[B, C, H, W]`` -> ``activation(conv + bias + channel_add) + residual``.

    ``padding`` is (top, bottom, left, right) and adds real zeros; ``channel_add`` is ``[B, N]``.
    """
    sums = accumulate_conv2d(
        x, row, x_index, weight, weight_bits, kernel_size, stride, padding, dilation, groups
    )
    y = sums.float() * (row[x_index, 0] * weight_scale)[:, None, None]
    if bias is not None:
        y = y + bias.float()[:, None, None]
    if channel_add is not None:
        y = y + channel_add.float()[:, :, None, None]
    return layout.image(finish(y, activation, residual, row, out_index, out_bits, out_dtype))


def group_norm_silu_quantize(
    x: Tensor,
    row: Tensor,
    index: int,
    bits: int,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Float ``[B, C, *]`` -> normalised, activated and (``index >= 0``) quantised."""
    grouped = x.double().reshape(x.shape[0], groups, -1)
    y = _normalized(grouped, eps).reshape(x.shape)
    per_channel = (-1,) + (1,) * (x.dim() - 2)
    y = _affine(y, weight, bias, per_channel)
    y = _activated(y.float(), activation)
    return layout.channels_last(_quantized_or_cast(y, row, index, bits, dtype))


def layer_norm_quantize(
    x: Tensor,
    row: Tensor,
    index: int,
    bits: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Float ``[..., D]`` -> normalised over D and (``index >= 0``) quantised."""
    y = _affine(_normalized(x.double(), eps), weight, bias, (-1,)).float()
    return _quantized_or_cast(y, row, index, bits, dtype).contiguous()


def geglu_quantize(
    x: Tensor, row: Tensor, index: int, bits: int, approximate: str, dtype: torch.dtype
) -> Tensor:
    """Float ``[..., 2D]`` -> integers of ``x[..., :D] * gelu(x[..., D:])``, ``[..., D]``."""
    value, gate = x.float().chunk(2, dim=-1)
    y = value * F.gelu(gate, approximate=approximate)
    return _quantized(y, row, index, bits, dtype).contiguous()


def cat_quantize(
    xs: Sequence[Tensor], row: Tensor, index: int, bits: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """The integers of float tensors laid end to end along ``dim``."""
    return quantize(torch.cat([x.float() for x in xs], dim), row, index, bits, "none", dtype)


def upsample_quantize(
    x: Tensor, row: Tensor, index: int, bits: int, factor: int, dtype: torch.dtype
) -> Tensor:
    """Float ``[B, C, H, W]`` -> integers ``[B, C, H * factor, W * factor]``, nearest."""
    q = quantize(x, row, index, bits, "none", dtype)
    return layout.image(q.repeat_interleave(factor, 2).repeat_interleave(factor, 3))


def add_quantize(
    a: Tensor, b: Tensor, row: Tensor, index: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """The integers of ``a + b``, floats of one shape."""
    return quantize(a.float() + b.float(), row, index, bits, "none", dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    q_index: int,
    k_index: int,
    v_index: int,
    mask: Tensor | None,
    scale: float | None,
    out_index: int,
    out_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """``softmax(q @ k.T * scale + mask) @ v`` in float32; ``[B, heads, tokens, d]``.

    An operand whose index is not negative is integers. A boolean mask marks what takes part, a
    float mask is added; a query that has nothing to look at gets zeros. ``scale`` is d^-0.5 if
    None. Softmax weights stay float32; kernels may round those of integers to eight bits.
    """
    q, k, v = (real(x, row, index) for x, index in ((q, q_index), (k, k_index), (v, v_index)))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.float()
    weights = scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)
    return layout.heads(_quantized_or_cast(weights @ v, row, out_index, out_bits, out_dtype))


def accumulate_linear(
    x: Tensor, row: Tensor, x_index: int, weight: Tensor, weight_bits: int
) -> Tensor:
    """The exact sums of (q_x - zero_point) * q_weight: int64 ``[..., N]``."""
    q_weight = unpacked(weight, weight_bits, (weight.shape[0], x.shape[-1]))
    return (_centered(x, row, x_index) @ q_weight.double().T).long()


def accumulate_conv2d(
    x: Tensor,
    row: Tensor,
    x_index: int,
    weight: Tensor,
    weight_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The exact sums of (q_x - zero_point) * q_weight: int64 ``[B, N, H, W]``."""
    natural = (weight.shape[0], x.shape[1] // groups, *kernel_size)
    q_weight = unpacked(weight, weight_bits, natural).double()
    top, bottom, left, right = padding
    padded = F.pad(_centered(x, row, x_index), (left, right, top, bottom))
    sums = F.conv2d(padded, q_weight, stride=tuple(stride), dilation=tuple(dilation), groups=groups)
    return sums.long()


def gated(y: Tensor, activation: str) -> Tensor:
    """The first half of float32 ``y`` times the activated second half."""
    value, gate = y.chunk(2, dim=-1)
    return value * _activated(gate, GATED[activation])


def finish(
    y: Tensor,
    activation: str,
    residual: Tensor | None,
    row: Tensor,
    out_index: int,
    out_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The end of a linear or convolution: activate float32 ``y``, add, then quantise or cast."""
    y = _activated(y, activation)
    if residual is not None:
        y = y + residual.float()
    return _quantized_or_cast(y, row, out_index, out_bits, out_dtype)


def _centered(x: Tensor, row: Tensor, index: int) -> Tensor:
    """q - zero_point in float64, from either storage."""
    shift = 128 if x.dtype == torch.uint8 else 0
    return x.double() - (row[index, 1].double() + shift)


def real(x: Tensor, row: Tensor, index: int) -> Tensor:
    """Float32 of a tensor that is integers unless ``index`` is negative."""
    return x.float() if index < 0 else _centered(x, row, index).float() * row[index, 0]


def _quantized(y: Tensor, row: Tensor, index: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Integers of float32 ``y`` in storage ``dtype``; a NaN becomes the lowest integer."""
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    q = torch.round(y / row[index, 0]) + row[index, 1]
    q = torch.where(q.isnan(), low, q).clamp(low, high)
    return (q + 128 if dtype == torch.uint8 else q).to(dtype)


def _quantized_or_cast(y: Tensor, row: Tensor, index: int, bits: int, dtype: torch.dtype) -> Tensor:
    return _quantized(y, row, index, bits, dtype) if index >= 0 else y.to(dtype)


def _activated(y: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "none":
        return y
    raise ValueError(f"activation {activation!r} is not one of none, silu, gelu, gelu_tanh")


def _normalized(x: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _affine(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    if weight is not None:
        y = y * weight.to(y.dtype).view(shape)
    if bias is not None:
        y = y + bias.to(y.dtype).view(shape)
    return y
