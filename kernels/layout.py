"""Shape and memory order of the tensors that kernels read and make, and where they lie.

Images (4-D, and any ``[B, C, *spatial]`` that a norm makes) keep their channels innermost, token
tensors are contiguous. Every kernel of an op gives the strides that its fake kernel promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of ``[B, C, *spatial]`` whose memory order is ``[B, *spatial, C]``."""
    channels = shape[1]
    spatial: list[int] = []
    step = channels
    for size in reversed(shape[2:]):
        spatial.insert(0, step)
        step = step * size
    return (step, 1, *spatial)


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty ``[B, C, *spatial]`` tensor with its channels innermost."""
    return torch.empty_strided(shape, channels_last_strides(shape), dtype=dtype, device=device)


def empty_image(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Channels last for a 4-D shape, contiguous for any other."""
    if len(shape) == 4:
        return empty_channels_last(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device)


def empty_heads(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[B, heads, tokens, d]`` whose memory order is ``[B, tokens, heads, d]``."""
    batch, heads, tokens, d = shape
    empty = torch.empty((batch, tokens, heads, d), dtype=dtype, device=device)
    return empty.transpose(1, 2)


def channels_last(x: Tensor) -> Tensor:
    """``x`` ``[B, C, *spatial]`` with exactly the strides of `empty_channels_last`."""
    if x.stride() == channels_last_strides(x.shape):
        return x
    return empty_channels_last(x.shape, x.dtype, x.device).copy_(x)


def image(x: Tensor) -> Tensor:
    """``x`` with exactly the strides of `empty_image`."""
    return channels_last(x) if x.dim() == 4 else x.contiguous()


def heads(x: Tensor) -> Tensor:
    """``x`` with exactly the strides of `empty_heads`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def convolved(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of the convolution of an image of ``size``."""
    top, bottom, left, right = padding
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    height = (size[0] + top + bottom - reach[0]) // stride[0] + 1
    width = (size[1] + left + right - reach[1]) // stride[1] + 1
    return height, width


def in_order(x: Tensor) -> Tensor:
    """``x`` contiguous, once an image has its channels last: its memory is that of `image`."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous()


def rows(shape: Sequence[int], dim: int) -> tuple[int, int]:
    """The memory of an `empty_image` cut where ``dim`` is outermost: how many rows, how long."""
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    sizes, cut = [shape[axis] for axis in order], order.index(dim)
    return math.prod(sizes[:cut]), math.prod(sizes[cut:])


def float32(parameter: Tensor | None) -> Tensor | None:
    """A parameter contiguous in float32."""
    return None if parameter is None else parameter.float().contiguous()


def address(x: Tensor | None) -> int | None:
    """Where ``x`` lies; null for no tensor. Whoever takes the address keeps the tensor."""
    return None if x is None else x.data_ptr()
