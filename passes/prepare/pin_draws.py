"""Draw random numbers in the memory order in which the model draws them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.nodes import aten, call, is_random, refresh
from fxquant.graph.options import Options


def pin_draws(gm: GraphModule, *, options: Options) -> GraphModule:
    """Numbers are drawn one after the other as memory goes, and kernels order images differently.

        %randn_like: f32[BxCx8hx8w] = randn_like(%conv2d)
    becomes
        %contiguous: f32[BxCx8hx8w] = contiguous(%conv2d)
        %randn_like: f32[BxCx8hx8w] = randn_like(%contiguous)
    """
    for node in list(gm.graph.nodes):
        if is_random(node) and _follows(node):
            _pin(gm, node)
    return gm


def _follows(node: Node) -> bool:
    """Does the result lie in memory as the first argument does?"""
    source = node.args[0] if node.args else None
    values: list[Any] = [n.meta.get("val") for n in (source, node) if isinstance(n, Node)]
    if len(values) != 2 or not all(isinstance(v, Tensor) for v in values):
        return False
    return [*map(str, values[0].shape)] == [*map(str, values[1].shape)]


def _pin(gm: GraphModule, node: Node) -> None:
    source: Any = node.args[0]
    order = _memory_order(source.meta["val"])
    back = [order.index(axis) for axis in range(len(order))]
    with gm.graph.inserting_before(node):
        if order == back == sorted(order):
            source = call(gm, aten.contiguous.default, (source,), like=node)
        else:
            moved = call(gm, aten.permute.default, (source, order), like=node)
            moved = call(gm, aten.contiguous.default, (moved,), like=node)
            source = call(gm, aten.permute.default, (moved, back), like=node)
    node.update_arg(0, source)
    if "memory_format" in node.kwargs:
        node.update_kwarg("memory_format", torch.preserve_format)
    refresh(gm, node)


def _memory_order(value: Tensor) -> list[int]:
    """Its dimensions from the outermost in memory to the innermost."""
    strides: list[Any] = list(value.stride())
    steps = [int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in strides]
    return sorted(range(value.ndim), key=lambda axis: -steps[axis])
