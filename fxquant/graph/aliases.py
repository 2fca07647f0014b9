"""Which memory a node's result lies in, asked of the operators and never of a list of views.

Kernels say it in their schemas. What PyTorch composes of them (reshape, contiguous, dropout, ...)
decides by sizes and strides, and its schema may even keep silent: such an operator is run on fake
tensors of the example's sizes and strides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guarding_hint_or_throw
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map_only

_COMPOSITE = "CompositeImplicitAutograd"


@dataclass(frozen=True)
class Sharing:
    """The inputs whose memory a result, or an item of it, lies in."""

    inputs: tuple[Node, ...] = ()
    same: bool = False
    """It is the very tensor that was given."""
    known: bool = True
    """Is it certain, and is it one input?"""


def writes(node: Node) -> bool:
    """May the call change one of its inputs?"""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def bound(node: Node) -> dict[str, Any]:
    """The arguments that were given, by the names of the schema."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def written(node: Node) -> dict[str, Node]:
    """The tensors that the call writes into, by the names of its arguments."""
    if not writes(node):
        return {}
    given = bound(node)
    schema = node.target._schema  # type: ignore[union-attr]
    names = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return {name: given[name] for name in names if isinstance(given.get(name), Node)}


def sharing(node: Node) -> Sharing:
    """What memory the result of a call lies in."""
    if node.op != "call_function" or not (writes(node) or _tensors(node)):
        return Sharing()
    if node.target is getitem:
        return Sharing((node.all_input_nodes[0],))
    if isinstance(node.target, HigherOrderOperator):
        tensors = tuple(n for n in node.all_input_nodes if _tensors(n))
        return Sharing(tensors, known=not tensors)
    if not isinstance(node.target, OpOverload) or not any(map(_tensors, node.all_input_nodes)):
        return Sharing()
    if writes(node):
        return Sharing(tuple(written(node).values()))
    if torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), _COMPOSITE):
        return _asked(node)
    return Sharing(_declared(node))


def closure(starts: Iterable[Node]) -> dict[Node, Sharing]:
    """All nodes that may lie in the memory of `starts`, each with what it shares."""
    found: dict[Node, Sharing] = {}
    looked: dict[Node, Sharing] = {}

    def look(node: Node) -> Sharing:
        return looked.setdefault(node, looked.get(node) or sharing(node))

    pending = list(starts)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found[node] = look(node)
        pending += found[node].inputs
        pending += [user for user in node.users if node in look(user).inputs]
    return found


def _declared(node: Node) -> tuple[Node, ...]:
    """The inputs that the schema says the result is a view of."""
    given = bound(node)
    schema = node.target._schema  # type: ignore[union-attr]
    values = [given.get(a.name) for a in schema.arguments if a.alias_info]
    return tuple(dict.fromkeys(v for v in tree_leaves(values) if isinstance(v, Node)))


def _asked(node: Node) -> Sharing:
    """Run a composite operator as eager PyTorch would and look at the memory it returns."""
    inputs = [n for n in node.all_input_nodes if _tensors(n)]
    try:
        given, result = _run_fake(node)
    except Exception:  # noqa: BLE001 - sizes that depend on values, for one: nobody can say
        return Sharing(_declared(node) or tuple(inputs), known=False)
    memory = _memory(result)
    shared = tuple(n for n in inputs if _memory(given[n]) & memory)
    same = len(shared) == 1 and result is given[shared[0]]
    return Sharing(shared, same, known=len(shared) <= 1)


def _run_fake(node: Node) -> tuple[dict[Node, Any], Any]:
    # A mode of its own with numbers for sizes, without the Python dispatcher: its decompositions
    # copy where the operators themselves return what they were given.
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode():
        given = {n: tree_map_only(Tensor, _alike, n.meta["val"]) for n in node.all_input_nodes}
        given = {n: _number(value) for n, value in given.items()}
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        assert callable(node.target)
        return given, node.target(*args, **kwargs)


def _alike(value: Tensor) -> Tensor:
    size, stride = ([_number(s) for s in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)


def _number(value: Any) -> Any:
    return guarding_hint_or_throw(value) if isinstance(value, torch.SymInt) else value


def _memory(value: Any) -> set[int]:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _tensors(node: Node) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta.get("val")))
