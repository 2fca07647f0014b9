"""Reading and rewriting calls of fxquant operators by argument name instead of position."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import fxquant.kernels.ops  # noqa: F401 - registers torch.ops.fxquant
from fxquant.graph.nodes import call, note, write_note

ops = torch.ops.fxquant
LAYERS = (ops.linear.default, ops.conv2d.default)
OPERANDS = frozenset({"x", "xs", "a", "b", "residual", "channel_add"})
"""What fxquant operators read in any float dtype that their kernels know, and compute in float32;
besides parameters, and masks of attention, whose q, k and v have one dtype."""
PRODUCTS = (*LAYERS, ops.attention.default)  # what may write integers after multiplying


def is_op(node: Any) -> bool:
    """Is it a call of an fxquant operator?"""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and str(node.target).startswith("fxquant.")
    )


def arguments(node: Node) -> dict[str, Any]:
    """The call's arguments by schema name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=True))


def roles(node: Node, value: Node) -> set[str]:
    """Names of the arguments that a value is."""
    return {
        name
        for name, given in arguments(node).items()
        if given is value or (isinstance(given, (list, tuple)) and value in given)
    }


def is_operand(node: Node, value: Node) -> bool:
    """Does the call read the value as more than a parameter or a mask?"""
    return bool(roles(node, value) & (OPERANDS | {"q", "k", "v"}))


def rewritten(gm: GraphModule, node: Node, **changes: Any) -> Node:
    """A copy of an fxquant call at the insertion point with some arguments changed."""
    merged = {**arguments(node), **changes}
    return call(gm, node.target, tuple(merged.values()), like=node)  # type: ignore[arg-type]


def take_over(
    gm: GraphModule, old: Node, target: Any, args: tuple[Any, ...], like: Node | None = None
) -> Node:
    """Replace `old` by a call of `target` in its place, computing the same value.

    Name and source note are `old`'s; the other notes are those of `like`, `old` by default.
    """
    name = old.name
    with gm.graph.inserting_before(old):
        new = call(gm, target, args, like=like or old)
    write_note(new, source=source_of(old))
    old.replace_all_uses_with(new, propagate_meta=False)
    gm.graph.erase_node(old)
    new.name = name
    return new


def source_of(node: Node) -> str:
    """Name of the fake-quant node whose value this lowered node computes."""
    return str(note(node, "source", node.name))
