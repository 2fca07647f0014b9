"""Bring products with a parameter to linear."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from fxquant.graph import nodes
from fxquant.graph.nodes import LAYOUT, LINEAR, argument, aten, call, calls, is_learned, shape
from fxquant.graph.options import Options

_MATMUL = (aten.matmul.default, aten.mm.default, aten.bmm.default)
_SEEN = (*LAYOUT, aten.t.default, aten.numpy_T.default, aten.mT.default)
_ADDED = (aten.addmm.default, aten.baddbmm.default)


def products_to_linear(gm: GraphModule, *, options: Options) -> GraphModule:
    """`x @ w` with a matrix that is a parameter is a linear, and so is `w @ x`, transposed.

        %matmul: f32[Bx6x16] = matmul(%x, w)
    becomes
        %transpose: f32[16x32] = transpose(w, 0, 1)
        %linear: f32[Bx6x16] = linear(%x, %transpose)
    and, in addmm and baddbmm, what is added becomes the bias, or an add of its own.
    """
    for node in calls(gm, *_MATMUL, *_ADDED):
        added = node.target in _ADDED
        left, right = node.args[added : added + 2]
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        with gm.graph.inserting_before(node):
            new = _product(gm, node, left, right)
            if new is not None:
                nodes.replace(node, _plus(gm, node, new) if added else new)
    return gm


def _product(gm: GraphModule, node: Node, left: Node, right: Node) -> Node | None:
    """The linear, if one factor is a matrix without inputs and the other one is not."""
    if _is_weight(gm, left) == _is_weight(gm, right):
        return None
    on_the_right = _is_weight(gm, right)
    weight, factor = (right, left) if on_the_right else (left, right)
    matrix = _matrix(gm, node, weight)
    if matrix is None or len(shape(factor)) < (2 if on_the_right else 3):
        return None
    if on_the_right:
        return call(gm, LINEAR, (factor, _swap(gm, node, matrix)), like=node)
    product = call(gm, LINEAR, (_swap(gm, node, factor), matrix), like=node)
    return _swap(gm, node, product)


def _is_weight(gm: GraphModule, node: Node) -> bool:
    """Is it a parameter, maybe seen transposed or repeated for every sample?"""
    while node.target in _SEEN:
        node = node.args[0]  # type: ignore[assignment]
    return is_learned(gm, node)


def _matrix(gm: GraphModule, like: Node, weight: Node) -> Node | None:
    """[K, N] of a weight [K, N], or [1, K, N] that all samples share; None of other shapes."""
    while weight.target is aten.expand.default and shape(weight)[0] != 1:
        weight = weight.args[0]  # type: ignore[assignment]
    sizes = shape(weight)
    if len(sizes) == 3 and sizes[0] == 1:
        weight = call(gm, aten.squeeze.dim, (weight, 0), like=like)
    return weight if len(shape(weight)) == 2 else None


def _swap(gm: GraphModule, like: Node, x: Node) -> Node:
    """The last two axes swapped."""
    return call(gm, aten.transpose.int, (x, -2, -1), like=like)


def _plus(gm: GraphModule, node: Node, product: Node) -> Node:
    """beta * added + alpha * product."""
    added: Any = node.args[0]
    beta, alpha = (argument(node, place, name, 1) for place, name in ((3, "beta"), (4, "alpha")))
    is_bias = added.op == "get_attr" and shape(added) == shape(product)[-1:]
    if beta == alpha == 1 and product.target is LINEAR and is_bias:
        product.args = (*product.args, added)
        return product
    if alpha != 1:
        product = call(gm, aten.mul.Tensor, (product, alpha), like=node)
    if beta == 0:
        return product
    return call(gm, aten.add.Tensor, (product, added), {"alpha": beta}, like=node)
