"""Inputs that become part of a graph, because they are the same in every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.nodes import (
    CONSTANTS,
    attribute,
    free_target,
    is_random,
    is_symbolic,
    set_buffer,
)
from fxquant.graph.runner import clone
from fxquant.graph.segment import inputs_of
from fxquant.graph.specialise import device_of
from fxquant.quant.fake_quant import fake_quantize_weight


def bound(gm: GraphModule, tensors: Mapping[int, Tensor]) -> GraphModule:
    """A clone that has these inputs, by position, as constants.

        %ids: f32[sx2] = input
        %mul: f32[sx2] = mul(%ids, 2)
    becomes
        %mul: f32[sx2] = mul(constants.ids, 2)
    """
    if not tensors:
        return gm
    gm, device = clone(gm), device_of(gm)
    nodes = inputs_of(gm)
    for position, tensor in tensors.items():
        _become(gm, nodes[position], tensor.to(device))
    gm.recompile()
    return gm


def folded(gm: GraphModule) -> GraphModule:
    """A clone of a specialised graph that computes nothing but what depends on its inputs.

    Unlike the pass fold_constants this takes tensors of any size. Weights stay fake-quantised, and
    random numbers are drawn in every call.
    """
    gm = clone(gm)
    values: dict[Node, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            values[node] = attribute(gm, str(node.target))
        elif _is_constant(node, values):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node in list(_last(values)):
        _become(gm, node, values[node].detach().contiguous())
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _is_constant(node: Node, values: Mapping[Node, Tensor]) -> bool:
    computed = node.op == "call_function" and not is_symbolic(node) and not is_random(node)
    if not computed or node.target is fake_quantize_weight:
        return False
    return all(n in values for n in node.all_input_nodes)


def _last(values: Mapping[Node, Tensor]) -> Iterator[Node]:
    """Computed constants, tensors each, that something else reads."""
    for node, value in values.items():
        is_read = any(user not in values for user in node.users)
        if node.op == "call_function" and is_read and isinstance(value, Tensor):
            yield node


def _become(gm: GraphModule, node: Node, value: Tensor) -> None:
    """Replace a node by a constant with its example value and notes."""
    target = set_buffer(gm, free_target(gm, f"{CONSTANTS}{node.name}"), value)
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(target)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant, propagate_meta=False)
    gm.graph.erase_node(node)
