"""Call a layer once where it is called again with the same input."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxquant.graph.nodes import is_layer, is_random, replace
from fxquant.graph.options import Options


def merge_layers(gm: GraphModule, *, options: Options) -> GraphModule:
    """A DiT embeds the timestep in its first block, and again by the same module at its end.

        %linear: f32[Bx64] = linear(%sinusoid, embedder.linear_1.weight, ...)
        %linear_9: f32[Bx64] = linear(%sinusoid_1, embedder.linear_1.weight, ...)
        %silu: f32[Bx64] = silu(%linear_9)
    becomes
        %linear: f32[Bx64] = linear(%sinusoid, embedder.linear_1.weight, ...)
        %silu: f32[Bx64] = silu(%linear)

    What leads to the second call goes with it. Other equal values stay two: they are cheap, and
    belong to the blocks that compute them.
    """
    seen: dict[Hashable, Node] = {}
    first: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        first[node] = seen.setdefault(_value(node, first), node)
    for node in list(gm.graph.nodes):
        if is_layer(node) and first[node] is not node:
            replace(node, first[node])
    return gm


def _value(node: Node, first: dict[Node, Node]) -> Hashable:
    """Equal for nodes that compute the same: the target, and the first node of every input."""
    if node.op not in ("call_function", "get_attr") or is_random(node):
        return node
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return (node.op, node.target, repr(spec), *(_leaf(leaf, first) for leaf in leaves))


def _leaf(leaf: Any, first: dict[Node, Node]) -> Hashable:
    return first[leaf] if isinstance(leaf, Node) else (type(leaf), repr(leaf))
