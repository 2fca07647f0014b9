"""What a call that writes into its arguments leaves in them, computed by calls that do not.

Schemas pair them up: `add_.Tensor(Tensor(a!) self, Tensor other, ...)` with `add.Tensor`, whose
arguments have the same names and types; `add.out` likewise, without what it only fills.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxquant.graph.aliases import bound, written
from fxquant.graph.nodes import aten, call
from fxquant.graph.views import sizes


class NoCounterpartError(Exception):
    """No operator computes what the call leaves; the message says why."""


def changes_shape(node: Node) -> bool:
    """Does it change how its argument is seen, and no element: unsqueeze_, detach_, ...?"""
    return isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags


def view_instead(gm: GraphModule, node: Node) -> Node:
    """The view that such a call turns its argument into."""
    return call(gm, _pure(_overload(node)), node.args, node.kwargs, like=node)


def what_is_written(gm: GraphModule, node: Node) -> Node:
    """The new value of the tensor that the call writes into.

    Raises:
        NoCounterpartError: nothing computes it.
    """
    (target,) = written(node).values()
    compute = _SPECIAL.get(_overload(node), _functional)
    return _fitting(gm, compute(gm, node), target, node)


def hidden_write(node: Node) -> Node | None:
    """The running mean that a norm in training mode updates, though its schema does not say so."""
    given = bound(node) if isinstance(node.target, OpOverload) else {}
    training = given.get(_NORMS.get(node.target, ""), False)
    mean = given.get("running_mean")
    return mean if training is True and isinstance(mean, Node) else None


_NORMS: dict[Any, str] = {
    aten.batch_norm.default: "training",
    aten.native_batch_norm.default: "training",
    aten.cudnn_batch_norm.default: "training",
    aten.instance_norm.default: "use_input_stats",
}


_DRAWS = frozenset(
    {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "log_normal_",
     "cauchy_"}
)  # fmt: skip
"""They fill a tensor with random numbers and do not ask what was in it."""


def _functional(gm: GraphModule, node: Node) -> Node:
    pure, given = _pure(_overload(node)), bound(node)
    if _overload(node)._opname in _DRAWS:  # in this dtype and order, however others compute
        blank = {
            "dtype": given["self"].meta["val"].dtype,
            "memory_format": torch.contiguous_format,
        }
        given["self"] = call(gm, aten.zeros_like.default, (given["self"],), blank, like=node)
    defaults = {a.name: a.default_value for a in _overload(node)._schema.arguments}
    needed = [a.name for a in pure._schema.arguments if not a.has_default_value()]
    if "self" in given:
        given[pure._schema.arguments[0].name] = given["self"]
    given = {**{name: defaults[name] for name in needed if name not in given}, **given}
    positional = [a.name for a in pure._schema.arguments if not a.kwarg_only]
    count = 1 + max(k for k, name in enumerate(positional) if name in given)
    args = tuple(given[name] if name in given else defaults[name] for name in positional[:count])
    named = [a.name for a in pure._schema.arguments if a.kwarg_only and a.name in given]
    return call(gm, pure, args, {name: given[name] for name in named}, like=node)


def _overload(node: Node) -> OpOverload:
    assert isinstance(node.target, OpOverload)
    return node.target


@functools.cache
def _pure(target: OpOverload) -> OpOverload:
    """The operator of the same arguments that returns what `target` writes."""
    schema = target._schema
    kept = _kinds([a for a in schema.arguments if not a.is_out])
    name = target._opname
    for packet in (name.removesuffix("_"), name, f"{name.removesuffix('_')}_functional"):
        for pure in _overloads(target.namespace, packet):
            if _kinds(pure._schema.arguments) == kept:
                return pure
    raise NoCounterpartError("no operator returns what it writes")


def _kinds(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    """Names and types; what is written is `self` here and may be `input` there."""
    return [(a.name if k else "self", str(a.type)) for k, a in enumerate(arguments)]


def _overloads(namespace: str, name: str) -> list[OpOverload]:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return [op for op in found if not op._schema.is_mutable]


def _fitting(gm: GraphModule, value: Node, target: Node, node: Node) -> Node:
    """`value` as `target` can hold it: a write changes neither dtype nor shape."""
    new, old = value.meta["val"], target.meta["val"]
    if new.dtype != old.dtype:
        value = call(gm, aten.to.dtype, (value, old.dtype), like=node)
    if not _same_sizes(new, old):
        if new.ndim > old.ndim or _overload(node)._schema.arguments[-1].is_out:
            raise NoCounterpartError("it changes the size of what it writes into")
        value = call(gm, aten.expand.default, (value, sizes(gm, target, node)), like=node)
    return value


def _same_sizes(a: Tensor, b: Tensor) -> bool:
    return [str(size) for size in a.shape] == [str(size) for size in b.shape]


def _copied(gm: GraphModule, node: Node) -> Node:
    """What copy_ and fill_ write: their other argument, where the written tensor is."""
    given = bound(node)
    target, source = given["self"].meta["val"], given.get("src", given.get("value"))
    assert isinstance(source, Node)
    if source.meta["val"].device == target.device:
        return source
    return call(gm, aten.to.device, (source, target.device, target.dtype), like=node)


def _filled(gm: GraphModule, node: Node) -> Node:
    """A number everywhere."""
    given = bound(node)
    return call(gm, aten.full_like.default, (given["self"], given.get("value", 0)), like=node)


_SPECIAL: dict[OpOverload, Callable[[GraphModule, Node], Node]] = {
    aten.copy_.default: _copied,
    aten.fill_.Tensor: _copied,
    aten.fill_.Scalar: _filled,
    aten.zero_.default: _filled,
}
