"""Edges that may be quantised, each seen through the layout operators on it.

An edge is an argument of a layer or of attention. A per-tensor quantiser commutes with operators
that only move elements (LAYOUT), and, since 0.0 is exactly representable, with padding by zeros
right before a convolution. So a quantiser sits at the *root* of its edge, next to the norm or
activation it will be fused with, and the layout operators between root and reader move integers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch.fx import Node

from fxquant.graph.nodes import (
    CONSTANT_PAD,
    CONV2D,
    LAYOUT,
    PAD,
    argument,
    is_attention,
    is_layer,
    note,
)

_INPUT, _ATTENTION = ("input",), ("q", "k", "v")


class Edge(NamedTuple):
    """One argument of a node: the input of a layer, or q, k or v of attention."""

    reader: Node
    name: str

    @property
    def position(self) -> int:
        """Of the argument."""
        return _ATTENTION.index(self.name) if self.name in _ATTENTION else 0

    @property
    def value(self) -> Node:
        """What the reader reads."""
        value = self.reader.args[self.position]
        assert isinstance(value, Node)
        return value

    @property
    def spec(self) -> dict[str, Any] | None:
        """What annotate decided: a QuantSpec's fields and the quantiser's index."""
        found: dict[str, Any] | None = (note(self.reader, "quant") or {}).get(self.name)
        return found


def edges(node: Node) -> list[Edge]:
    """The edges into a node, in the order of its arguments; none of what is never quantised."""
    if is_layer(node):
        return [Edge(node, name) for name in _INPUT]
    return [Edge(node, name) for name in _ATTENTION] if is_attention(node) else []


def quantised_edges(node: Node) -> list[Edge]:
    """Those that annotate gave a spec."""
    return [edge for edge in edges(node) if edge.spec]


def layout_chain(edge: Edge) -> list[Node]:
    """Layout operators on the edge, nearest to its reader first."""
    chain: list[Node] = []
    node: Any = edge.value
    while isinstance(node, Node) and (
        node.target in LAYOUT or _is_zero_pad(node, edge.reader, chain)
    ):
        chain.append(node)
        node = node.args[0]
    return chain


def edge_source(edge: Edge) -> Node:
    """The node above the edge's layout chain."""
    chain = layout_chain(edge)
    source = chain[-1].args[0] if chain else edge.value
    assert isinstance(source, Node)
    return source


def edge_root(edge: Edge, quantised: Collection[Edge]) -> tuple[Node, list[Node]]:
    """The highest node a quantiser of this edge may follow, and the chain below it.

    The walk stops at an operator that something else than the `quantised` edges reads as well.
    """
    chain: list[Node] = []
    for node in layout_chain(edge):
        if not _feeds_only(node, quantised):
            break
        chain.append(node)
    root = chain[-1].args[0] if chain else edge.value
    assert isinstance(root, Node)
    return root, chain


def _feeds_only(node: Node, quantised: Collection[Edge]) -> bool:
    return all(
        _reads_only(user, node, quantised)
        or (
            (user.target in LAYOUT or all(_is_zero_pad(user, reader, []) for reader in user.users))
            and _feeds_only(user, quantised)
        )
        for user in node.users
    )


def _reads_only(user: Node, node: Node, quantised: Collection[Edge]) -> bool:
    """Does `user` read `node` on quantised edges alone?"""
    reading = [edge for edge in edges(user) if edge.value is node]
    return user.args.count(node) == len(reading) > 0 and all(e in quantised for e in reading)


def _is_zero_pad(node: Node, layer: Node, chain: list[Node]) -> bool:
    """Zero padding directly before a convolution; it becomes the convolution's own.

    What a convolution cannot do itself stays an operator of its own, and quantisers follow it: to
    crop, to pad channels or batch, by sizes that are only known in a call, with other values.
    """
    if chain or layer.target is not CONV2D or node.target not in (PAD, CONSTANT_PAD):
        return False
    is_constant = node.target is CONSTANT_PAD or argument(node, 2, "mode", "constant") == "constant"
    value = argument(node, 2 if node.target is CONSTANT_PAD else 3, "value")
    return is_constant and value in (None, 0) and _widens_the_image(argument(node, 1, "pad"))


def _widens_the_image(pad: Any) -> bool:
    """Does it add rows and columns only? `pad` has two numbers an axis, the last axis first."""
    numbers = isinstance(pad, list | tuple) and all(type(side) is int for side in pad)
    return numbers and min(pad, default=0) >= 0 and not any(pad[4:])
