"""Casts between the dtypes of a graph's values: made once per value, dropped where idle."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.lowered import OPERANDS, is_op, roles
from fxquant.graph.nodes import aten, call, calls, only_user, refresh, replace, write_note


def float_dtype(node: Node) -> torch.dtype | None:
    """Of a float tensor; None for any other value."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else None


class Casts:
    """Every value in every dtype that somebody reads it in."""

    def __init__(self, gm: GraphModule):
        self._gm = gm
        self._made: dict[tuple[Node, torch.dtype], Node] = {}

    def of(self, node: Node, dtype: torch.dtype) -> Node:
        """The node itself, or the one cast of it that all readers share."""
        if float_dtype(node) in (None, dtype):
            return node
        if (node, dtype) not in self._made:
            self._made[node, dtype] = self._make(node, dtype)
        return self._made[node, dtype]

    def _make(self, node: Node, dtype: torch.dtype) -> Node:
        graph = self._gm.graph
        after = node
        if node.op == "placeholder":
            after = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(after):
            cast = call(self._gm, aten.to.dtype, (node, dtype), like=node)
        write_note(cast, quant=None)
        return cast


def set_dtype(node: Node, dtype: torch.dtype) -> bool:
    """Set the dtype argument that a call has; False if it has none, or has that one."""
    for position, field in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if field.name not in ("dtype", "out_dtype"):
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(field.name)
        if given == dtype:
            return False
        if position < len(node.args):
            node.update_arg(position, dtype)
        else:
            node.update_kwarg(field.name, dtype)
        return True
    return False


def simplify(gm: GraphModule, read: Collection[torch.dtype]) -> None:
    """Drop casts that change no value.

        %to: f32[...] = to(%x, f32)            x is bf16 and %layer_norm reads that, too
        %layer_norm: f32[...] = fxquant.layer_norm_quantize(%to, ..., f32)
        %to_1: bf16[...] = to(%layer_norm, bf16)
    becomes
        %layer_norm: bf16[...] = fxquant.layer_norm_quantize(%x, ..., bf16)

    Args:
        read: float dtypes that the operands of fxquant operators may have.
    """
    for cast in calls(gm, aten.to.dtype):
        _write_directly(gm, cast, read)
    for cast in calls(gm, aten.to.dtype):
        _read_directly(cast, read)
    for cast in calls(gm, aten.to.dtype):
        _skip_wider(cast)
        source = cast.args[0]
        assert isinstance(source, Node)
        if source.meta["val"].dtype == cast.args[1]:
            replace(cast, source)


def _write_directly(gm: GraphModule, cast: Node, written: Collection[torch.dtype]) -> None:
    """What only the cast reads of an fxquant operator, it writes in the cast's dtype."""
    source = cast.args[0]
    if cast.args[1] not in written or not is_op(source) or only_user(source) is not cast:  # type: ignore[arg-type]
        return
    if set_dtype(source, cast.args[1]):  # type: ignore[arg-type]
        refresh(gm, source)  # type: ignore[arg-type]


def _read_directly(cast: Node, read: Collection[torch.dtype]) -> None:
    """fxquant operators compute in float32 by themselves."""
    source, dtype = cast.args[:2]
    assert isinstance(source, Node)
    if dtype != torch.float32 or float_dtype(source) not in read:
        return
    for user in list(cast.users):
        if is_op(user) and roles(user, cast) <= OPERANDS:
            user.replace_input_with(cast, source)


def _skip_wider(cast: Node) -> None:
    """Read past a cast that lost nothing."""
    inner = cast.args[0]
    assert isinstance(inner, Node)
    if inner.target is not aten.to.dtype or not isinstance(inner.args[0], Node):
        return
    source = inner.args[0].meta["val"].dtype
    wide = inner.meta["val"].dtype
    lossless = wide.is_floating_point and torch.promote_types(source, wide) == wide
    if lossless and (only_user(inner) is cast or source == cast.args[1]):
        cast.replace_input_with(inner, inner.args[0])
