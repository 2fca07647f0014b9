"""Attention by torch's own kernels, wherever they run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels import layout
from fxquant.kernels.config import Config


def why_not(config: Config) -> str | None:
    """Why torch cannot run ``config``."""
    dtypes = {config.tensors[name].dtype for name in ("q", "k", "v")}
    if not all(dtype.is_floating_point for dtype in dtypes):
        return "it reads floats"
    if dtypes != {config.options["out_dtype"]}:
        return "it writes what it reads"
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
    """As `reference.attention`, on floats."""
    return layout.heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
