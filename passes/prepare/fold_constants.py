"""Compute at compile time what does not depend on the inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.nodes import (
    CONSTANTS,
    attribute,
    free_target,
    get_attr,
    is_random,
    is_symbolic,
    replace,
    set_buffer,
)
from fxquant.graph.options import Options

_LARGEST = 1 << 16  # elements: frequency tables and the like, never a weight


def fold_constants(gm: GraphModule, *, options: Options) -> GraphModule:
    """Small input-free subexpressions become buffers; random numbers are drawn in every call.

        %arange: f32[16] = arange(0, 16)
        %exp: f32[16] = exp(%arange)
        %mul: f32[Bx16] = mul(%timestep, %exp)
    becomes
        %mul: f32[Bx16] = mul(%timestep, constants.exp)
    """
    values: dict[Node, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and attribute(gm, str(node.target)).numel() <= _LARGEST:
            values[node] = attribute(gm, str(node.target))
        elif _is_foldable(node, values):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node in list(values):
        if node.op == "call_function" and any(user not in values for user in node.users):
            _bind(gm, node, values[node])
    return gm


def _is_foldable(node: Node, values: dict[Node, Tensor]) -> bool:
    if node.op != "call_function" or is_symbolic(node) or is_random(node):
        return False
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(s, int) for s in value.shape):
        return False
    return value.numel() <= _LARGEST and all(n in values for n in node.all_input_nodes)


def _bind(gm: GraphModule, node: Node, value: Tensor) -> None:
    target = free_target(gm, f"{CONSTANTS}{node.name}")
    set_buffer(gm, target, value.detach().clone())
    with gm.graph.inserting_before(node):
        replace(node, get_attr(gm, target, like=node))
