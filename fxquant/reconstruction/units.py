"""Which module a node is reconstructed with: a block, or a lone layer.

The unit is the outermost enclosing module whose class is in BLOCKS; a conv2d or linear outside any
block is a unit of its own. It is derived from the module stack alone, so it is known at any stage
and needs no per-model code.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from fxquant.graph.nodes import is_layer, note

Unit = tuple[str, str]  # module path, class name

BLOCKS = frozenset(
    {
        "ResnetBlock2D",
        "ResnetBlockCondNorm2D",
        "BasicTransformerBlock",
        "Attention",
        "AttentionBlock",
        "MultiheadAttention",
        "TransformerEncoderLayer",
        "TransformerDecoderLayer",
    }
)


def unit_of(node: Node) -> list[str] | None:
    """[module path, class name] of the node's unit, None for what belongs to no unit."""
    stack = note(node, "stack") or []
    for path, kind in stack:
        if kind in BLOCKS:
            return [path, kind]
    if is_layer(node) and stack:
        return list(stack[-1])
    return None


def pieces(gm: GraphModule, units: Mapping[Node, Unit]) -> dict[Node, int]:
    """For every node of a unit the number, from 0, of the convex piece that it is in.

    A module that is called twice, or functional layers of one module with something between them,
    leave their unit and come back. What comes back starts a new piece; what only feeds one piece,
    as weights do, belongs to it. A unit that nothing leaves and enters again is one piece.
    """
    found = _first_pieces(gm, units)
    for node in reversed(gm.graph.nodes):
        if node in found and node.users and all(units.get(n) == units[node] for n in node.users):
            found[node] = min(found[user] for user in node.users)
    numbers: dict[Unit, list[int]] = {}
    for node, piece in found.items():
        numbers.setdefault(units[node], []).append(piece)
    ranks = {
        unit: {piece: k for k, piece in enumerate(sorted(set(taken)))}
        for unit, taken in numbers.items()
    }
    return {node: ranks[units[node]][piece] for node, piece in found.items()}


def _first_pieces(gm: GraphModule, units: Mapping[Node, Unit]) -> dict[Node, int]:
    """The first piece that each node may be in: it comes after those left on the way to it."""
    found: dict[Node, int] = {}
    left: dict[Node, dict[Unit, int]] = {}  # the first piece that a reader of the node may be in
    for node in gm.graph.nodes:
        after: dict[Unit, int] = {}
        for source in node.all_input_nodes:
            stays = units.get(source) is not None and units.get(source) == units.get(node)
            for unit, piece in left[source].items():
                leaves = unit == units.get(source) and not stays
                after[unit] = max(after.get(unit, 0), piece + leaves)
        if node in units:
            found[node] = after[units[node]] = after.get(units[node], 0)
        left[node] = after
    return found
