"""The edge into a layer, seen through the layout operators on it.

A per-tensor quantiser commutes with operators that only move elements (LAYOUT), and, since 0.0 is
exactly representable, with padding by zeros right before a convolution. So a quantiser sits at the
*root* of its edge, next to the norm or activation it will be fused with, and the layout operators
between root and layer move integers.
"""

from __future__ import annotations

from torch.fx import Node

from fxquant.graph.nodes import CONSTANT_PAD, CONV2D, LAYOUT, PAD, argument


def layout_chain(layer: Node) -> list[Node]:
    """Layout operators from the layer's input upwards, nearest first."""
    chain: list[Node] = []
    node = layer.args[0]
    while isinstance(node, Node) and (node.target in LAYOUT or _is_zero_pad(node, layer, chain)):
        chain.append(node)
        node = node.args[0]
    return chain


def edge_source(layer: Node) -> Node:
    """The node above the layer's layout chain."""
    chain = layout_chain(layer)
    source = chain[-1].args[0] if chain else layer.args[0]
    assert isinstance(source, Node)
    return source


def edge_root(layer: Node, quantised: set[Node]) -> tuple[Node, list[Node]]:
    """The highest node a quantiser of this layer's input may follow, and the chain below it.

    The walk stops at an operator that something unquantised reads as well.
    """
    chain: list[Node] = []
    for node in layout_chain(layer):
        if not _feeds_only(node, quantised):
            break
        chain.append(node)
    root = chain[-1].args[0] if chain else layer.args[0]
    assert isinstance(root, Node)
    return root, chain


def _feeds_only(node: Node, quantised: set[Node]) -> bool:
    return all(
        (user in quantised and user.args[0] is node)
        or (
            (user.target in LAYOUT or user.target in (PAD, CONSTANT_PAD))
            and _feeds_only(user, quantised)
        )
        for user in node.users
    )


def _is_zero_pad(node: Node, layer: Node, chain: list[Node]) -> bool:
    """Zero padding directly before a convolution; it becomes the convolution's own."""
    if chain or layer.target is not CONV2D or len(node.args) < 2:
        return False
    if node.target is CONSTANT_PAD:
        return not argument(node, 2, "value", 0)
    return (
        node.target is PAD
        and argument(node, 2, "mode", "constant") == "constant"
        and not argument(node, 3, "value")
    )
