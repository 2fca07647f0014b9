"""What sizes a captured graph takes, read off its inputs' symbolic shapes.

A dimension is fixed (channels, embedding width), free (batch, prompt length), or free in steps
(height and width in multiples of 8, say, since every level of a UNet halves them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import CallError


@dataclass(frozen=True)
class Limit:
    """One dimension: exactly `size`, or any positive multiple of `multiple`."""

    size: int | None
    multiple: int = 1


def input_limits(gm: GraphModule) -> list[tuple[Limit, ...]]:
    """Limits of every input's dimensions, in input order."""
    values = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    return [tuple(_limit(size) for size in value.shape) for value in values]


def check_limits(name: str, tensor: Tensor, limits: Sequence[Limit]) -> None:
    """Raise CallError where a tensor's shape is not one the graph takes."""
    for axis, (size, limit) in enumerate(zip(tensor.shape, limits, strict=True)):
        if limit.size is not None and size != limit.size:
            wanted = f"{limit.size}, as captured"
        elif size == 0 or size % limit.multiple:
            wanted = f"a positive multiple of {limit.multiple}"
        else:
            continue
        raise CallError(
            f"{name} has shape {tuple(tensor.shape)}; its dimension {axis} must be {wanted}"
        )


def _limit(size: Any) -> Limit:
    if not isinstance(size, torch.SymInt):
        return Limit(int(size))
    number, symbols = size.node.expr.as_coeff_Mul()
    return Limit(int(number)) if symbols == 1 else Limit(None, max(1, int(number)))
