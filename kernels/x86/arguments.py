"""What the C++ is told: dtypes and activations as numbers.h has them, a quantiser's address."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = {torch.float32: 0, torch.bfloat16: 1}
TYPES = FLOATS | {torch.uint8: 2, torch.int8: 3}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


def step(row: Tensor, index: int) -> int | None:
    """The address of the quantiser's scale and zero point; None for a float output."""
    if index < 0:
        return None
    if row.dtype != torch.float32 or not row.is_contiguous() or index >= row.shape[0]:
        raise ValueError(f"quantiser {index} is not in a contiguous float32 row {row.shape}")
    return row.data_ptr() + 8 * index
