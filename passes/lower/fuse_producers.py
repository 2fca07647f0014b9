"""Fuse the operators before a quantize into it, and the float norms with their activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.graph.lowered import arguments, ops, take_over
from fxquant.graph.nodes import argument, aten, calls, is_symbolic, only_user, shape
from fxquant.graph.options import Options
from fxquant.passes.lower.fuse_epilogues import activation_name

QUANTIZE = ops.quantize.default


def fuse_producers(gm: GraphModule, *, options: Options) -> GraphModule:
    """No full-size float tensor is written between a norm and the layer that reads it.

        %group_norm: f32[Bx32x8hx8w] = group_norm(%x, 8, norm1.weight, norm1.bias, 1e-05)
        %silu: f32[Bx32x8hx8w] = silu(%group_norm)
        %fq_0: u8[Bx32x8hx8w] = fxquant.quantize(%silu, %row, index=0, ...)
    becomes
        %fq_0: u8[Bx32x8hx8w] = fxquant.group_norm_silu_quantize(%x, %row, index=0, ...)
    """
    for node in calls(gm, QUANTIZE):
        for rule in RULES:
            match = rule(node)
            if match:
                take_over(gm, node, *match)
                break
    gm.graph.eliminate_dead_code()
    row = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "row")
    for node in calls(gm, aten.group_norm.default, aten.layer_norm.default):
        _lower_float_norm(gm, node, row)
    gm.graph.eliminate_dead_code()
    return gm


Match = tuple[Any, tuple[Any, ...]]


def _group_norm(quantize: Node) -> Match | None:
    """quantize(silu(group_norm(x))) and quantize(group_norm(x))."""
    x, activation = _behind_activation(quantize)
    if (
        x.target is not aten.group_norm.default
        or activation not in ("none", "silu")
        or not only_user(x)
    ):
        return None
    return ops.group_norm_silu_quantize.default, _group_norm_arguments(x, quantize, activation)


def _group_norm_arguments(norm: Node, quantize: Node, activation: str) -> tuple[Any, ...]:
    q = arguments(quantize)
    weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
    eps = argument(norm, 4, "eps", 1e-5)
    return (
        norm.args[0],
        q["row"],
        q["index"],
        q["bits"],
        weight,
        bias,
        norm.args[1],
        eps,
        activation,
        q["dtype"],
        "reference",
    )


def _layer_norm(quantize: Node) -> Match | None:
    x = quantize.args[0]
    assert isinstance(x, Node)
    if x.target is not aten.layer_norm.default or not _over_last(x) or not only_user(x):
        return None
    q = arguments(quantize)
    weight, bias = argument(x, 2, "weight"), argument(x, 3, "bias")
    args = (
        x.args[0],
        q["row"],
        q["index"],
        q["bits"],
        weight,
        bias,
        argument(x, 4, "eps", 1e-5),
        q["dtype"],
        "reference",
    )
    return ops.layer_norm_quantize.default, args


def _geglu(quantize: Node) -> Match | None:
    """quantize(a * gelu(b)) with a, b = x.chunk(2, -1)."""
    product = quantize.args[0]
    assert isinstance(product, Node)
    if product.target is not aten.mul.Tensor or not only_user(product):
        return None
    value, gate = product.args[:2]
    if (
        not isinstance(value, Node)
        or not isinstance(gate, Node)
        or not (activation_name(gate) or "").startswith("gelu")
    ):
        return None
    second = gate.args[0]
    if value.args[1:] != (0,) or not isinstance(second, Node):
        return None
    chunk = value.args[0]
    if second.args != (chunk, 1):
        return None
    if not isinstance(chunk, Node) or chunk.target is not aten.chunk.default or chunk.args[1] != 2:
        return None
    if argument(chunk, 2, "dim", 0) not in (-1, len(shape(value)) - 1):
        return None
    q = arguments(quantize)
    approximate = "tanh" if activation_name(gate) == "gelu_tanh" else "none"
    return ops.geglu_quantize.default, (
        chunk.args[0],
        q["row"],
        q["index"],
        q["bits"],
        approximate,
        q["dtype"],
        "reference",
    )


def _cat(quantize: Node) -> Match | None:
    """Only where nobody else needs the float concatenation."""
    x = quantize.args[0]
    assert isinstance(x, Node)
    if x.target is not aten.cat.default or not only_user(x):
        return None
    q = arguments(quantize)
    dim = argument(x, 1, "dim", 0)
    return ops.cat_quantize.default, (
        x.args[0],
        q["row"],
        q["index"],
        q["bits"],
        dim,
        q["dtype"],
        "reference",
    )


def _upsample(quantize: Node) -> Match | None:
    """Nearest by the same integer in height and width."""
    x = quantize.args[0]
    assert isinstance(x, Node)
    if x.target is not aten.upsample_nearest2d.vec or not only_user(x):
        return None
    factors = argument(x, 2, "scale_factors")
    if not factors or factors[0] != factors[1] or factors[0] != int(factors[0]):
        return None
    q = arguments(quantize)
    return ops.upsample_quantize.default, (
        x.args[0],
        q["row"],
        q["index"],
        q["bits"],
        int(factors[0]),
        q["dtype"],
        "reference",
    )


def _add(quantize: Node) -> Match | None:
    x = quantize.args[0]
    assert isinstance(x, Node)
    if x.target is not aten.add.Tensor or not only_user(x) or argument(x, 2, "alpha", 1) != 1:
        return None
    a, b = x.args[:2]
    if (
        not isinstance(a, Node)
        or not isinstance(b, Node)
        or is_symbolic(a)
        or is_symbolic(b)
        or [*map(str, shape(a))] != [*map(str, shape(b))]
    ):
        return None
    q = arguments(quantize)
    return ops.add_quantize.default, (
        a,
        b,
        q["row"],
        q["index"],
        q["bits"],
        q["dtype"],
        "reference",
    )


def _activation(quantize: Node) -> Match | None:
    source, activation = _behind_activation(quantize)
    if activation == "none":
        return None
    changed = {**arguments(quantize), "x": source, "activation": activation}
    return QUANTIZE, tuple(changed.values())


RULES: tuple[Callable[[Node], Match | None], ...] = (
    _group_norm,
    _layer_norm,
    _geglu,
    _cat,
    _upsample,
    _add,
    _activation,
)


def _behind_activation(quantize: Node) -> tuple[Node, str]:
    """The quantize's input, or what an activation only it reads was applied to."""
    x = quantize.args[0]
    assert isinstance(x, Node)
    name = activation_name(x) if x.op == "call_function" else None
    if name and only_user(x):
        return x.args[0], name  # type: ignore[return-value]
    return x, "none"


def _over_last(norm: Node) -> bool:
    return len(norm.args[1]) == 1  # type: ignore[arg-type]


def _lower_float_norm(gm: GraphModule, norm: Node, row: Node) -> None:
    """A norm that a float operator reads: the same kernels without the quantisation."""
    dtype: torch.dtype = norm.meta["val"].dtype
    weight, bias, eps = (
        argument(norm, 2, "weight"),
        argument(norm, 3, "bias"),
        argument(norm, 4, "eps", 1e-5),
    )
    if norm.target is aten.layer_norm.default:
        if _over_last(norm):
            take_over(
                gm,
                norm,
                ops.layer_norm_quantize.default,
                (norm.args[0], row, -1, 8, weight, bias, eps, dtype, "reference"),
            )
        return
    user = only_user(norm)
    silu = user is not None and user.target is aten.silu.default
    args = (
        norm.args[0],
        row,
        -1,
        8,
        weight,
        bias,
        norm.args[1],
        eps,
        "silu" if silu else "none",
        dtype,
        "reference",
    )
    if silu:
        assert user is not None
        take_over(gm, user, ops.group_norm_silu_quantize.default, args)
    else:
        take_over(gm, norm, ops.group_norm_silu_quantize.default, args)
