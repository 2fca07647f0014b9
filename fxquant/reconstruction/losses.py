"""What the reconstruction of a unit minimises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences over dimension 1, mean over the others (BRECQ, EDA-DM).

    In float32 at least: half precision overflows on a wide layer.
    """
    difference = a - b
    if difference.dtype in (torch.float16, torch.bfloat16):
        difference = a.float() - b.float()
    return difference.square().sum(1 if difference.ndim > 1 else ()).mean()  # of no channels: all


def block_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Error of a unit's outputs, added up: the loss of block-wise, and of layer-wise, methods."""
    return torch.stack([squared_error(a, b) for a, b in zip(outputs, targets, strict=True)]).sum()


def fbr_loss(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    inner: Sequence[Tensor],
    inner_targets: Sequence[Tensor],
    gamma: float,
) -> Tensor:
    """Fine-grained block reconstruction (EDA-DM, arXiv 2401.04585, section IV-B).

    Block loss plus gamma times the error of every layer inside.

    Args:
        inner: results of the layers inside, without the one that produces the unit's output: it
            would count twice.
    """
    block = block_loss(outputs, targets)
    return block + gamma * block_loss(inner, inner_targets) if inner else block
