"""The dtype that every float of a lowered graph is computed in: a property of values, not of names.

*Exact* values keep the dtype that the model gives them, float32 as a rule:
- what is computed from integers, timesteps, sizes, ids and other small inputs (at most one number
  per sample and feature) alone, up to the first operator with learned weights;
- everything between such an operator, or an input, and one that does not forgive rounding:
  sin(30 * conv(x)), a comparison, an index, a cumulative sum; see `tolerance`.
Constants take part in both. Image-sized floats, which is everything else, are *rounded*: they
compute in the 16-bit dtype of the machine, unless the model itself asks for more (`.float()` in a
16-bit model). Where an exact value meets a rounded one, it is rounded there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph import tolerance
from fxquant.graph.lowered import is_op, is_operand
from fxquant.graph.nodes import aten, attribute, is_layer, is_symbolic
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight

_FEW = 8  # of so many exact numbers a layer makes features in float32: its weights are tiny
_SMALL = 1 << 16  # elements of what fold_constants makes; of masks, not of weights
_SHAPES = frozenset({aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int})


class Kind(Enum):
    """What becomes of a float value."""

    EXACT = "exact"
    ROUNDED = "rounded"
    CONSTANT = "constant"  # as its readers want it


def compute_dtypes(gm: GraphModule, compute: torch.dtype) -> dict[Node, torch.dtype]:
    """The dtype that each call computes its floats in, of all that read or write any.

    Also of each float input: what it is worth to operators that read any dtype.

    Args:
        compute: of image-sized floats.
    """
    kinds = _kinds(gm, _needed(gm))
    far = _far_values(gm, compute)
    model = next((d for n in gm.graph.nodes if n.op == "placeholder" for d in _dtypes(n)), compute)
    return {
        node: _exact_dtype(node)
        if kind is Kind.EXACT or is_simulated(node) or _own(node).itemsize > model.itemsize
        else _widened(compute)
        if node in far
        else compute
        for node, kind in kinds.items()
        if node.op != "get_attr"
    }


def _exact_dtype(node: Node) -> torch.dtype:
    """The model's own; float32 where kernels of 16 bits may lack, or would round in between."""
    plain = node.op == "placeholder" or (may_round(node) and not _starts_features(node))
    return _own(node) if plain else _widened(_own(node))


def layers_of_numbers(gm: GraphModule) -> set[Node]:
    """The layers that make features of a few exact numbers: eight bits of a time are no time."""
    kinds = _kinds(gm, set())
    return {
        node
        for node in filter(is_layer, gm.graph.nodes)
        if _terms(node) <= _FEW and kinds.get(node.all_input_nodes[0]) is Kind.EXACT
    }


def computes(node: Node) -> bool:
    """Is it a call that reads or writes floats?"""
    if node.op != "call_function" or node.target in _SHAPES:
        return False
    return any(map(has_float, (node, *node.all_input_nodes)))


def has_float(node: Node) -> bool:
    """Is the value a float or complex tensor, or are there any among its items?"""
    return any(True for _ in _dtypes(node))


def is_simulated(node: Node) -> bool:
    """Is it a layer whose integers no kernel multiplies? They have more bits than bfloat16."""
    weight = node.args[1] if is_layer(node) else None
    return isinstance(weight, Node) and weight.target is fake_quantize_weight


def may_round(node: Node) -> bool:
    """May the node's floats have 16 bits, were they image-sized?

    Not where it makes integers, booleans or Python numbers of floats, or touches complex numbers.
    """
    if is_op(node):
        return True
    touched = [d for n in (node, *node.all_input_nodes) for d in _dtypes(n)]
    if any(d.is_complex for d in touched) or not tolerance.forgives(node):
        return False
    return has_float(node) or tolerance.is_creation(node)


def _needed(gm: GraphModule) -> set[Node]:
    """What an operator that does not forgive rounding depends on, back to quantisers and inputs.

    An fxquant operator ends the search: it reads eight bits, or normalises.
    """
    needed: set[Node] = set()
    for node in filter(computes, reversed(gm.graph.nodes)):
        demands = not _is_quantised(node) and not may_round(node)
        if demands and has_float(node):
            needed.add(node)
        if demands or is_simulated(node) or (node in needed and not _is_quantised(node)):
            needed.update(filter(has_float, node.all_input_nodes))
    return needed


def _is_quantised(node: Node) -> bool:
    return is_op(node) or node.target in (fake_quantize, fake_quantize_weight)


def _kinds(gm: GraphModule, needed: set[Node]) -> dict[Node, Kind]:
    """Of every value with floats; constants are settled by who reads them."""
    kinds: dict[Node, Kind] = {}
    first = next(iter(gm.graph.nodes))
    for node in gm.graph.nodes:
        if node.op == "placeholder" and has_float(node):
            exact = node in needed or _counts(node, first)
            kinds[node] = Kind.EXACT if exact else Kind.ROUNDED
        elif node.op == "get_attr":
            kinds[node] = Kind.CONSTANT
        elif computes(node):
            strict = node in needed or not may_round(node)
            kinds[node] = Kind.EXACT if strict else _kind(node, kinds)
    for node in reversed(kinds):
        if kinds[node] is Kind.CONSTANT:
            wanted = any(kinds.get(user) is Kind.EXACT for user in node.users)
            kinds[node] = Kind.EXACT if wanted else Kind.ROUNDED
    return kinds


def _counts(node: Node, first: Node) -> bool:
    """Is the input a few numbers per sample: timesteps, sizes, ids, guidance, a pooled prompt?"""
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.ndim <= (1 if node is first else 2)


def _kind(node: Node, kinds: Mapping[Node, Kind]) -> Kind:
    """Of what no sensitive operator depends on, by what it reads."""
    read = {kinds[n] for n in node.all_input_nodes if has_float(n)}
    if Kind.ROUNDED in read or _narrows(node):
        return Kind.ROUNDED
    if _starts_features(node):
        return Kind.EXACT if Kind.EXACT in read and _terms(node) <= _FEW else Kind.ROUNDED
    if Kind.EXACT in read:
        return Kind.EXACT
    counted = any(_is_tensor(n) for n in node.all_input_nodes)
    return Kind.EXACT if counted and not read else Kind.CONSTANT


def _starts_features(node: Node) -> bool:
    return _is_quantised(node) or tolerance.is_learned(node)


def _terms(node: Node) -> float:
    """How many numbers each result of a product is the sum of."""
    if is_op(node) or len(node.args) < 2 or not isinstance(node.args[1], Node):
        return math.inf
    a, b = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
    kind = tolerance.name(node)
    if kind in ("linear", "matmul", "mm"):
        return a.shape[-1] if isinstance(a.shape[-1], int) else math.inf
    return math.prod(b.shape[1:]) if kind.startswith("conv") else math.inf


def _narrows(node: Node) -> bool:
    """Does the model itself round here to the 16 bits that it computes in?"""
    read = [d for n in node.all_input_nodes for d in _dtypes(n)]
    return bool(read) and _own(node).itemsize == 2 < max(d.itemsize for d in read)


def _far_values(gm: GraphModule, compute: torch.dtype) -> set[Node]:
    """Rounded values that 16 bits cannot hold, up to what makes them moderate again."""
    far = {n for n in gm.graph.nodes if n.op == "get_attr" and _overflows(gm, n, compute)}
    for node in filter(computes, gm.graph.nodes):
        if _is_quantised(node):
            continue
        moderate = tolerance.is_learned(node) or not has_float(node)
        reads = any(n in far and not tolerance.is_bounded(n) for n in node.all_input_nodes)
        if not moderate and (reads or tolerance.leaves_range(node, compute)):
            far.add(node)
    return far


def _overflows(gm: GraphModule, node: Node, dtype: torch.dtype) -> bool:
    """Does a constant hold finite numbers that are infinite in this dtype?"""
    value = attribute(gm, str(node.target))
    if not has_float(node) or value.is_complex() or not 0 < value.numel() <= _SMALL:
        return False
    if value.is_meta:
        return False  # it has no numbers
    numbers = value.detach()[value.isfinite()].abs()
    return bool((numbers > torch.finfo(dtype).max).any())


def _own(node: Node) -> torch.dtype:
    """The float dtype that the model computes the node in."""
    found = list(_dtypes(node)) or [d for n in _values(node) for d in _dtypes(n)]
    return reduce(torch.promote_types, map(_real, found or [torch.bfloat16]))


def _values(node: Node) -> Iterable[Node]:
    """What a node reads, besides the parameters of fxquant operators."""
    return [n for n in node.all_input_nodes if not is_op(node) or is_operand(node, n)]


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real()


def _dtypes(node: Node) -> Iterator[torch.dtype]:
    """The float and complex dtypes in a node's value."""
    for value in _items(node.meta.get("val")):
        if value.is_floating_point() or value.is_complex():
            yield value.dtype


def _items(value: Any) -> Iterable[Tensor]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, Tensor)]


def _is_tensor(node: Node) -> bool:
    return not is_symbolic(node) and bool(_items(node.meta.get("val")))
