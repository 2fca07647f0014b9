"""Compute weights that are made of parameters once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.nodes import (
    attribute,
    free_target,
    get_attr,
    is_layer,
    is_learned,
    is_random,
    is_symbolic,
    module_path,
    replace,
    set_parameter,
)
from fxquant.graph.options import Options
from fxquant.graph.segment import before

_SMALL = 1 << 22  # elements: what is larger, and larger than what it is made of, is no weight


def fold_weights(gm: GraphModule, *, options: Options) -> GraphModule:
    """What is computed from parameters, buffers and numbers alone is a parameter itself.

    So are weights of weight_norm and spectral_norm, standardised and transposed ones, and keys of
    learned tokens.

        %_weight_norm: f32[16x16x3x3] = _weight_norm(conv.original1, conv.original0)
        %conv2d: f32[Bx16x8hx8w] = conv2d(%x, %_weight_norm, conv.bias)
    becomes
        %conv2d: f32[Bx16x8hx8w] = conv2d(%x, conv.weight, conv.bias)
    """
    made_of = _made_of(gm)
    wanted = [n for n in made_of if _is_read(n, made_of) and _learned(gm, made_of[n])]
    needed = before(wanted)
    values = _compute(gm, [n for n in made_of if n in needed])
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and _stays(n, made_of)}
    for node in wanted:
        name = _name(gm, node, made_of[node], read)
        read.add(name)
        set_parameter(gm, name, values[node].contiguous())
        with gm.graph.inserting_before(node):
            replace(node, get_attr(gm, name, like=node))
    return gm


def _made_of(gm: GraphModule) -> dict[Node, frozenset[Node]]:
    """The attributes that every foldable computation reads, without the attributes themselves."""
    found: dict[Node, frozenset[Node]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_symbolic(node) or is_random(node):
            continue
        sources = node.all_input_nodes
        if all(n.op == "get_attr" or n in found for n in sources):
            leaves = frozenset().union(*(found.get(n, {n}) for n in sources))
            if _is_small(node, leaves):
                found[node] = leaves
    return found


def _is_small(node: Node, leaves: Iterable[Node]) -> bool:
    """Has the result fixed sizes, and does it hold no more than what it is made of?"""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return isinstance(value, (tuple, list)) and bool(leaves)
    if not all(isinstance(size, int) for size in value.shape):
        return False
    return value.numel() <= max(_SMALL, sum(n.meta["val"].numel() for n in leaves))


def _compute(gm: GraphModule, nodes: Iterable[Node]) -> dict[Node, Tensor]:
    values: dict[Node, Tensor] = {}

    def value(node: Node) -> Tensor:
        return values[node] if node in values else attribute(gm, str(node.target))

    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), value)
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _stays(attribute_node: Node, folded: Mapping[Node, object]) -> bool:
    """Does anything but what is folded read it?"""
    return any(user not in folded for user in attribute_node.users)


def _is_read(node: Node, folded: Mapping[Node, object]) -> bool:
    """Is it a tensor that something else reads?"""
    return isinstance(node.meta["val"], Tensor) and _stays(node, folded)


def _learned(gm: GraphModule, leaves: Iterable[Node]) -> list[str]:
    """Names of the parameters among the attributes."""
    return sorted({str(n.target) for n in leaves if is_learned(gm, n)})


def _name(gm: GraphModule, node: Node, leaves: Iterable[Node], read: set[str]) -> str:
    """The name of the only parameter that it is made of, or of the layer's weight that it is."""
    learned = _learned(gm, leaves)
    if len(learned) == 1:
        return learned[0] if learned[0] not in read else free_target(gm, learned[0])
    layer = next((user for user in node.users if is_layer(user) and user.args[1] is node), None)
    place, leaf = (module_path(layer), "weight") if layer else (module_path(node), node.name)
    return free_target(gm, ".".join(filter(None, (place, leaf))))
