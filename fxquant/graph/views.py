"""What a tensor is once a view of it has been written: the inverse of every view.

    %slice_1 = slice(%h, 1, 0, 2)
    %mul = mul(%slice_1, 3)             # was written into the slice
    %h_1 = slice_scatter(%h, %mul, 1, 0, 2)

A view without a line in the table is asked where each of its elements lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.aliases import bound
from fxquant.graph.nodes import aten, call

Value = Node | list[Node]  # a list is what split and its like return, item by item


class NoInverseError(Exception):
    """What is written into a view cannot be found in its base; the message says why."""


def again(gm: GraphModule, view: Node, base: Node | None, value: Value, like: Node) -> Value:
    """The view taken anew of `value`; `base` is what `view` took it of."""
    return value[_item(view)] if isinstance(value, list) else _applied(gm, view, base, value, like)


def scattered(
    gm: GraphModule, view: Node, base: Node | None, old: Value, new: Value, like: Node
) -> Value:
    """The base's value after its view has become `new`.

    Args:
        view, base: the call, and its argument that it is a view of.
        old: the base's value before.

    Raises:
        NoInverseError: what is written cannot be told from the view's elements.
    """
    if view.target is getitem:
        items: list[Any] = [*_items(gm, old, like)]
        items[_item(view)] = new
        return items
    assert isinstance(old, Node)
    if _overlaps(view):
        raise NoInverseError("elements of it may lie in the same place")
    name = str(view.target._opname)  # type: ignore[union-attr]
    inverse = _INVERSES.get(name, _by_position)
    return inverse(_Write(gm, view, base, old, like), new)


def alike(a: tuple[Node, Node | None], b: tuple[Node, Node | None]) -> bool:
    """Are two views, each with its base as it was, taken by the same call?"""
    return _call_without(*a) == _call_without(*b)


def _call_without(view: Node, base: Node | None) -> tuple[Any, ...]:
    rest = map_arg((view.args, view.kwargs), lambda n: None if n is base else n)
    return view.target, rest


class _Write:
    """A view that was written, and the means to say so in the graph."""

    def __init__(self, gm: GraphModule, view: Node, base: Node | None, old: Node, like: Node):
        self.gm, self.view, self.base, self.old, self.like = gm, view, base, old, like

    def call(self, target: Callable[..., Any], *args: Any) -> Node:
        return call(self.gm, target, args, like=self.like)

    def argument(self, name: str, default: Any = None) -> Any:
        return bound(self.view).get(name, default)

    def sizes(self) -> list[Any]:
        """Of the base, as arguments."""
        return sizes(self.gm, self.old, self.like)


def sizes(gm: GraphModule, value: Node, like: Node) -> list[Any]:
    """A tensor's sizes as arguments: numbers, and nodes for what is free."""
    return [
        size if isinstance(size, int) else _size(gm, value, axis, size, like)
        for axis, size in enumerate(value.meta["val"].shape)
    ]


def _size(gm: GraphModule, value: Node, axis: int, size: Any, like: Node) -> Node:
    node = gm.graph.call_function(aten.sym_size.int, (value, axis))
    node.meta = {k: like.meta[k] for k in ("custom", "stack_trace") if k in like.meta}
    node.meta["val"] = size
    return node


def _item(view: Node) -> int:
    index = view.args[1]
    assert isinstance(index, int)
    return index


def _items(gm: GraphModule, value: Value, like: Node) -> list[Node]:
    if isinstance(value, list):
        return value
    count = len(value.meta["val"])
    return [call(gm, getitem, (value, k), like=like) for k in range(count)]


def _applied(gm: GraphModule, view: Node, base: Node | None, value: Node, like: Node) -> Node:
    args, kwargs = map_arg((view.args, view.kwargs), lambda n: value if n is base else n)
    # `view` asks for a layout that only the first value is known to have.
    target: Any = aten.reshape.default if view.target is aten.view.default else view.target
    return call(gm, target, args, kwargs, like=like)


def _overlaps(view: Node) -> bool:
    """Are some elements of the view the same element of its base?"""
    if view.target in (aten.as_strided.default, aten.unfold.default):
        return True
    value = view.meta["val"]
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return any(_repeats(tensor) for tensor in tensors)


def _repeats(value: Tensor) -> bool:
    pairs = zip(value.shape, value.stride(), strict=True)
    return any(isinstance(step, int) and step == 0 and not _is_one(size) for size, step in pairs)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size <= 1


def _part(scatter: Any, *names: str) -> Callable[[_Write, Node], Node]:
    """A part of the base is replaced: by `scatter`, which takes the view's own arguments."""

    def inverse(write: _Write, new: Node) -> Node:
        schema = write.view.target._schema  # type: ignore[union-attr]
        defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        values = [write.argument(name, defaults.get(name)) for name in names]
        return write.call(scatter, write.old, new, *values)

    return inverse


def _narrow(write: _Write, new: Node) -> Node:
    dim, start, length = (write.argument(name) for name in ("dim", "start", "length"))
    if not (isinstance(start, int) and isinstance(length, int) and start >= 0):
        return _by_position(write, new)
    return write.call(aten.slice_scatter.default, write.old, new, dim, start, start + length)


def _same_order(write: _Write, new: Node) -> Node:
    return write.call(aten.reshape.default, new, write.sizes())


def _same(write: _Write, new: Node) -> Node:
    return new


def _own_inverse(write: _Write, new: Node) -> Node:
    return _applied(write.gm, write.view, write.base, new, write.like)


def _permute(write: _Write, new: Node) -> Node:
    order = write.argument("dims")
    axes = [axis % len(order) for axis in order]
    return write.call(aten.permute.default, new, [axes.index(k) for k in range(len(axes))])


def _joined(write: _Write, new: Sequence[Node]) -> Node:
    return write.call(aten.cat.default, list(new), write.argument("dim", 0))


def _stacked(write: _Write, new: Sequence[Node]) -> Node:
    return write.call(aten.stack.default, list(new), write.argument("dim", 0))


def _as_real(write: _Write, new: Node) -> Node:
    return write.call(aten.view_as_real.default, new)


def _as_complex(write: _Write, new: Node) -> Node:
    parts = [write.call(aten.select.int, new, -1, k) for k in range(2)]
    return write.call(aten.complex.default, *parts)


def _real(write: _Write, new: Node) -> Node:
    if not write.old.meta["val"].is_complex():
        return new
    return write.call(aten.complex.default, new, write.call(aten.imag.default, write.old))


def _imag(write: _Write, new: Node) -> Node:
    return write.call(aten.complex.default, write.call(aten.real.default, write.old), new)


def _view(write: _Write, new: Node) -> Node:
    dtype = write.old.meta["val"].dtype
    if write.view.target is aten.view.dtype:
        return write.call(aten.view.dtype, new, dtype)
    return _same_order(write, new)


def _by_position(write: _Write, new: Value) -> Node:
    """Number the base's elements, see which numbers the view has, and put its elements there."""
    if write.old.meta["val"].is_complex():
        raise NoInverseError("nothing says where its elements lie")
    flat = write.call(aten.reshape.default, write.old, [-1])
    ones = call(write.gm, aten.ones_like.default, (flat,), {"dtype": torch.int64}, like=write.like)
    count = write.call(aten.sub.Tensor, write.call(aten.cumsum.default, ones, 0), 1)
    numbers = write.call(aten.reshape.default, count, write.sizes())
    places = _applied(write.gm, write.view, write.base, numbers, write.like)
    pairs = [(places, new)]
    if isinstance(new, list):
        pairs = list(zip(_items(write.gm, places, write.like), new, strict=True))
    for pair in pairs:
        where, what = (write.call(aten.reshape.default, part, [-1]) for part in pair)
        flat = write.call(aten.index_put.default, flat, [where], what)
    return write.call(aten.reshape.default, flat, write.sizes())


_SLICE = _part(aten.slice_scatter.default, "dim", "start", "end", "step")
_INVERSES: dict[str, Callable[..., Node]] = {
    "slice": _SLICE,
    "select": _part(aten.select_scatter.default, "dim", "index"),
    "diagonal": _part(aten.diagonal_scatter.default, "offset", "dim1", "dim2"),
    "narrow": _narrow,
    "permute": _permute,
    **dict.fromkeys(
        ("transpose", "t", "mT", "numpy_T", "swapaxes", "swapdims", "_conj", "conj"), _own_inverse
    ),
    **dict.fromkeys(
        ("reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "ravel", "squeeze",
         "unsqueeze", "view_as", "reshape_as", "expand", "expand_as", "broadcast_to",
         "atleast_1d", "atleast_2d", "atleast_3d"),
        _same_order,
    ),
    **dict.fromkeys(
        ("alias", "detach", "lift_fresh", "contiguous", "positive", "dropout", "feature_dropout",
         "alpha_dropout", "feature_alpha_dropout", "to", "type_as", "resolve_conj",
         "resolve_neg"),
        _same,
    ),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _joined),
    "unbind": _stacked,
    "view": _view,
    "view_as_real": _as_complex,
    "view_as_complex": _as_real,
    "real": _real,
    "imag": _imag,
}  # fmt: skip


__all__ = ["NoInverseError", "Value", "again", "alike", "scattered", "sizes"]
