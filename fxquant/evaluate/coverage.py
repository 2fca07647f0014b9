"""How much of a model runs in which precision: operators, parameters, multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from fxquant.graph.explain import MOVES, precision
from fxquant.graph.interpret import Watched
from fxquant.graph.lowered import LAYERS, arguments, ops
from fxquant.graph.nodes import CONV2D, LINEAR, aten
from fxquant.kernels.reference import GATED
from fxquant.quant.fake_quant import fake_quantize_weight

Sizes = Mapping[Node, tuple[int, ...]]

_ATTENTION = (ops.attention.default, aten.scaled_dot_product_attention.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Row:
    """What runs in one precision, see fxquant.graph.explain.Explanation."""

    precision: str
    operators: int
    parameters: int
    macs: int


def coverage(gm: GraphModule, tensors: Sequence[Tensor]) -> list[Row]:
    """One row a precision, the most multiply-accumulates first.

    Args:
        gm: a graph after the pass select_kernels.
        tensors: its inputs in one call, the table row left out; only shapes and dtypes are read.
    """
    shapes, held = sizes(gm, tensors), parameters(gm)
    totals: dict[str, list[int]] = {}
    for node in gm.graph.nodes:
        kind = precision(node)
        if node.op == "call_function" and kind != MOVES:
            total = totals.setdefault(kind, [0, 0, 0])
            found = (1, held.get(node, 0), macs(node, shapes))
            totals[kind] = [a + b for a, b in zip(total, found, strict=True)]
    rows = [Row(kind, *total) for kind, total in totals.items()]
    return sorted(rows, key=lambda row: (-row.macs, -row.parameters))


def sizes(gm: GraphModule, tensors: Sequence[Tensor]) -> dict[Node, tuple[int, ...]]:
    """The shape of every tensor in one call; nothing is computed."""
    found: dict[Node, tuple[int, ...]] = {}

    def see(node: Node, value: Any, env: dict[Node, Any]) -> None:
        if isinstance(value, Tensor):
            found[node] = tuple(value.shape)

    row = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "row")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        inputs = [mode.from_tensor(t) for t in tensors]
        Watched(gm, see).run(*inputs, torch.empty(tuple(row.meta["val"].shape)))
    return found


def parameters(gm: GraphModule) -> dict[Node, int]:
    """Numbers in the weights, biases and norms that each operator is the first to read.

    Packed integers count as what they hold; scales are not the model's parameters.
    """
    counted: set[str] = set()
    held: dict[Node, int] = {}
    for node in gm.graph.nodes:
        simulated = node.target is fake_quantize_weight
        scale = arguments(node)["weight_scale"] if node.target in LAYERS else None
        scale = node.args[1] if simulated else scale
        holder = next(iter(node.users)) if simulated else node
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source is not scale and source.target not in counted:
                counted.add(str(source.target))
                held[holder] = held.get(holder, 0) + _numbers(node, source)
    return held


def _numbers(node: Node, source: Node) -> int:
    value: Tensor = source.meta["val"]
    if node.target in LAYERS and arguments(node)["weight"] is source:
        return int(value.shape[0] * _reach(node, tuple(arguments(node)["x"].meta["val"].shape)))
    return int(value.numel())


def macs(node: Node, shapes: Sizes) -> int:
    """Multiply-accumulates of a node's matrix products; 0 for what has none."""
    if node.target in LAYERS:
        halves = 2 if arguments(node)["activation"] in GATED else 1
        return prod(shapes[node]) * halves * _reach(node, shapes[arguments(node)["x"]])
    inputs = [shapes.get(a, ()) for a in node.args if isinstance(a, Node)]
    if node.target in (CONV2D, LINEAR):
        return prod(shapes[node]) * prod(inputs[1][1:])
    if node.target in _ATTENTION:
        q, k, v = inputs[:3]
        return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    if node.target in _PRODUCTS:
        return prod(shapes[node]) * inputs[0][-1]
    return 0


def _reach(layer: Node, x: tuple[Any, ...]) -> int:
    """Inputs that one output of an integer layer sums over."""
    found = arguments(layer)
    if "kernel_size" not in found:
        return int(x[-1])
    return int(x[1]) // int(found["groups"]) * int(prod(found["kernel_size"]))
