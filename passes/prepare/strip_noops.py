"""Remove what computes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.nodes import argument, aten, refresh, replace
from fxquant.graph.options import Options


def strip_noops(gm: GraphModule, *, options: Options) -> GraphModule:
    """Dropout, identities, asserts, arithmetic with neutral constants, casts to the same dtype.

    Views become reshapes and explicit memory layouts go: layout is the kernels' choice.

        %dropout: f32[BxCx8hx8w] = dropout(%conv2d, 0, False)
        %div: f32[BxCx8hx8w] = div(%add, 1)
        %view: f32[Bx64xC] = view(%div, [B, 64, C])
    becomes
        %view: f32[Bx64xC] = reshape(%add, [B, 64, C])
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTS and not node.users:
            gm.graph.erase_node(node)
        elif node.target in _IDENTITIES and _IDENTITIES[node.target](node):
            source = node.args[0]
            assert isinstance(source, Node)
            replace(node, source)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default
            refresh(gm, node)
    return gm


def _always(node: Node) -> bool:
    return True


def _same_value(node: Node) -> bool:
    """Does the result have the input's shape and dtype?"""
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    new, old = node.meta["val"], source.meta["val"]
    return isinstance(old, Tensor) and new.dtype == old.dtype and _same_shape(new, old)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim and all(str(i) == str(j) for i, j in zip(a.shape, b.shape, strict=True))


def _by(constant: float) -> Callable[[Node], bool]:
    """Is the second operand this number, and does the first keep shape and dtype?"""

    def check(node: Node) -> bool:
        number = node.args[1]
        plain = isinstance(number, int | float) and number == constant and not node.kwargs
        return plain and _same_value(node)

    return check


def _whole_slice(node: Node) -> bool:
    start, end, step = (
        argument(node, 2, "start"),
        argument(node, 3, "end"),
        argument(node, 4, "step", 1),
    )
    return not start and step == 1 and (end is None or end == 2**63 - 1)


def _expands_nothing(node: Node) -> bool:
    return _same_value(node)


_ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
        torch.ops.aten._assert_async.msg,
    }
)
_IDENTITIES: dict[object, Callable[[Node], bool]] = {
    aten.dropout.default: lambda n: not argument(n, 2, "train", False),
    aten.feature_dropout.default: lambda n: not argument(n, 2, "train", False),
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.contiguous.default: _always,
    aten.clone.default: _always,
    aten.to.dtype: _same_value,
    aten.to.dtype_layout: _same_value,
    aten._to_copy.default: _same_value,
    aten.expand.default: _expands_nothing,
    aten.reshape.default: _same_value,
    aten.view.default: _same_value,
    aten.slice.Tensor: _whole_slice,
    aten.add.Tensor: _by(0),
    aten.sub.Tensor: _by(0),
    aten.mul.Tensor: _by(1),
    aten.div.Tensor: _by(1),
    aten.pow.Tensor_Scalar: _by(1),
}
