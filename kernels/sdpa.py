"""Attention by torch's own kernels, wherever they run: integers are made real first."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels import layout, reference
from fxquant.kernels.config import Config
from fxquant.kernels.cuda import build, producers


def why_not(config: Config) -> str | None:
    """It runs anything."""
    return None


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
    """As `reference.attention`, in the dtype of floats that have one, else in float32."""
    if q_index >= 0 or len({x.dtype for x in (q, k, v)}) > 1:
        indices = (q_index, k_index, v_index)
        q, k, v = (_real(x, row, i) for x, i in zip((q, k, v), indices, strict=True))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if out_index >= 0 and y.device.type == "cuda" and _has_producers(y.device):
        batch, heads, tokens, d = y.shape
        flat = y.transpose(1, 2).reshape(batch, tokens, heads * d)
        q = producers.quantize(flat, row, out_index, out_bits, "none", out_dtype)
        return q.view(batch, tokens, heads, d).transpose(1, 2)
    if out_index >= 0:
        y = reference.quantize(y, row, out_index, out_bits, "none", out_dtype)
    return layout.heads(y.to(out_dtype))


def _real(x: Tensor, row: Tensor, index: int) -> Tensor:
    """Floats of integers: float16 on a GPU, which has kernels for it and holds q - z exactly."""
    if index < 0 or x.device.type != "cuda":
        return reference.real(x, row, index)
    return ((x.half() - row[index, 1].half()) * row[index, 0]).half()


@functools.cache
def _has_producers(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return "producers" in build.available(f"{major}.{minor}")
