"""Operators with learned values that are no layer: what is said of them, since they stay float."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from fxquant.graph.nodes import LAYOUT, SDPA, aten, is_layer, is_learned, is_symbolic, note

MOVING = LAYOUT | {
    aten.chunk.default,
    aten.split.Tensor,
    aten.slice.Tensor,
    aten.select.int,
    operator.getitem,
}
_CASTS = (aten.to.dtype, aten.type_as.default, aten.view_as_complex.default)
# What reads learned values without being a layer in anybody's eyes: it moves or looks them up,
# scales and shifts by them, or is a norm, which has kernels of its own.
_LIGHT = MOVING | {
    SDPA,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.cat.default,
    aten.stack.default,
    aten.where.self,
    aten.index.Tensor,
    aten.index_select.default,
    aten.repeat.default,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.embedding.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten._to_copy.default,
    *_CASTS,
}


def is_weighted(gm: GraphModule, node: Node) -> bool:
    """Does it compute with a parameter, and is it neither layer nor norm nor plain arithmetic?"""
    if is_layer(node) or not _counts(node):
        return False
    return any(_is_parameter(gm, source) for source in node.all_input_nodes)


def reason_to_stay_float(node: Node) -> str | None:
    """What annotate noted on a layer, or another operator with weights, that stays float."""
    quant = note(node, "quant") or {}
    return str(quant["float"]) if "float" in quant and (is_layer(node) or _counts(node)) else None


def _counts(node: Node) -> bool:
    known = str(node.target).startswith("fxquant.") or node.target in _LIGHT
    return node.op == "call_function" and not is_symbolic(node) and not known


def _is_parameter(gm: GraphModule, node: Node) -> bool:
    """Is it one, maybe seen through what moves elements or changes the dtype?"""
    while node.op == "call_function" and (node.target in MOVING or node.target in _CASTS):
        node = node.args[0]  # type: ignore[assignment]
    return is_learned(gm, node)
