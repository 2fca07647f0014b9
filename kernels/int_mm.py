"""Linear and conv2d on a GPU without our kernels: slower, by torch's own operators.

A linear multiplies integers with ``torch._int_mm``; what that cannot do, and every convolution, is
dequantised and multiplied in the dtype of its output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels import layout, reference
from fxquant.kernels.config import Config
from fxquant.kernels.int4 import unpacked

_FEWEST_ROWS = 17  # torch._int_mm takes no fewer, and sizes that are multiples of 8
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def why_not(config: Config) -> str | None:
    """Why torch's operators should not run ``config``."""
    if config.device != "cuda":
        return f"it runs on a GPU, the tensors are on {config.device}"
    return None


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
    """As `reference.linear`; sums of integers are exact where `torch._int_mm` takes them."""
    channels, outputs = x.shape[-1], weight.shape[0]
    integers = unpacked(weight, weight_bits, (outputs, channels))
    rows = x.numel() // max(channels, 1)
    if x.dtype == torch.int8 and rows >= _FEWEST_ROWS and channels % 8 == outputs % 8 == 0:
        sums = torch._int_mm(x.reshape(rows, channels), integers.T).reshape(*x.shape[:-1], outputs)
        sums = sums - row[x_index, 1].int() * integers.sum(1, dtype=torch.int32)
        y = sums.float() * (row[x_index, 0] * weight_scale)
        y = y if bias is None else y + bias.float()
    else:
        dtype = _float_dtype(out_dtype, residual)
        real = reference.real(x, row, x_index).to(dtype)
        scaled = (integers.float() * weight_scale[:, None]).to(dtype)
        y = F.linear(real, scaled, None if bias is None else bias.to(dtype)).float()
    if activation in reference.GATED:
        if residual is not None:
            raise ValueError(f"{activation} takes no residual")
        y, activation = reference.gated(y, activation), "none"
    return reference.finish(
        y, activation, residual, row, out_index, out_bits, out_dtype
    ).contiguous()


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
    """As `reference.conv2d`, in floats: real zeros are what the padding adds."""
    dtype = _float_dtype(out_dtype, residual)
    natural = unpacked(weight, weight_bits, (weight.shape[0], x.shape[1] // groups, *kernel_size))
    scaled = (natural.float() * weight_scale[:, None, None, None]).to(dtype)
    top, bottom, left, right = padding
    real = F.pad(reference.real(x, row, x_index).to(dtype), (left, right, top, bottom))
    y = F.conv2d(
        real, scaled, None if bias is None else bias.to(dtype), tuple(stride),
        dilation=tuple(dilation), groups=groups,
    ).float()  # fmt: skip
    if channel_add is not None:
        y = y + channel_add.float()[:, :, None, None]
    return layout.image(
        reference.finish(y, activation, residual, row, out_index, out_bits, out_dtype)
    )


def _float_dtype(out_dtype: torch.dtype, residual: Tensor | None) -> torch.dtype:
    """The dtype that is computed in: the output's, the residual's of integers, else float16."""
    if out_dtype in _FLOATS:
        return out_dtype
    return residual.dtype if residual is not None else torch.float16
