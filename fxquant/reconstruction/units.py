"""Which module a node is reconstructed with: a block, or a lone layer.

The unit is the outermost enclosing module whose class is in BLOCKS; a conv2d or linear outside any
block is a unit of its own. It is derived from the module stack alone, so it is known at any stage
and needs no per-model code.
"""

from __future__ import annotations

from torch.fx import Node

from fxquant.graph.nodes import is_layer, note

BLOCKS = frozenset(
    {
        "ResnetBlock2D",
        "ResnetBlockCondNorm2D",
        "BasicTransformerBlock",
        "Attention",
        "AttentionBlock",
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
