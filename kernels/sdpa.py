"""Attention by torch's own kernels, wherever they run: integers are made real first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels import layout, reference
from fxquant.kernels.config import Config


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
        q, k, v = (reference.real(x, row, i) for x, i in zip((q, k, v), indices, strict=True))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if out_index >= 0:
        y = reference.quantize(y, row, out_index, out_bits, "none", out_dtype)
    return layout.heads(y.to(out_dtype))
