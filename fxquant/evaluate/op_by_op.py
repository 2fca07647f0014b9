"""Compares a lowered graph with the fake-quant graph, operator by operator on the same inputs.

A quantised network is chaotic: end to end, two correct executions of it drift apart by about the
quantisation error. So every lowered node is run by itself, on inputs taken from the fake-quant
graph, and its result is held against the value of the fake-quant node it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxquant.graph.lowered import arguments, source_of
from fxquant.graph.nodes import attribute, is_symbolic

_INTEGERS = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class Difference:
    """One lowered node against its fake-quant value.

    Attributes:
        node: its name.
        op: its operator.
        integer: whether the result is quantised.
        error: largest difference in least significant bits for integer results, relative L2 error
            for float ones.
    """

    node: str
    op: str
    integer: bool
    error: float


def compare(
    fake_quant: GraphModule, lowered: GraphModule, tensors: Sequence[Tensor], row: Tensor
) -> list[Difference]:
    """Every tensor node of the lowered graph, in order.

    Args:
        tensors: flat inputs of one call, float32.
        row: [n, 2] activation parameters that both graphs use.
    """
    with torch.no_grad():
        truth = _values(fake_quant, (*tensors, row))
        expected = _Expected(lowered, truth, row)
        return [
            _difference(node, _evaluate(lowered, node, expected), expected(node))
            for node in lowered.graph.nodes
            if node.op == "call_function" and isinstance(node.meta["val"], Tensor)
        ]


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule):
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n.name] = value = super().run_node(n)
        return value


def _values(gm: GraphModule, inputs: Sequence[Tensor]) -> dict[str, Any]:
    recorder = _Recorder(gm)
    recorder.run(*inputs)
    return recorder.values


class _Expected:
    """The value a lowered node should have, made from the fake-quant one."""

    def __init__(self, lowered: GraphModule, truth: dict[str, Any], row: Tensor):
        self.lowered, self.truth, self.row = lowered, truth, row

    def __call__(self, node: Node) -> Any:
        if node.op == "get_attr":
            return attribute(self.lowered, str(node.target))
        if is_symbolic(node) or node.op == "placeholder":
            return self.truth[node.name]
        value = self.truth[source_of(node)]
        if not isinstance(value, Tensor):
            return value
        dtype = node.meta["val"].dtype
        return self._integers(node, value) if dtype in _INTEGERS else value.to(dtype)

    def _integers(self, node: Node, value: Tensor) -> Tensor:
        scale, zero = self.row[_quantiser(node)]
        q = torch.round(value.float() / scale) + zero
        unsigned = node.meta["val"].dtype == torch.uint8
        return (q + 128 if unsigned else q).to(node.meta["val"].dtype)


def _quantiser(node: Node) -> int:
    """Index of the quantiser whose integers this node holds, up through layout operators."""
    while not {"index", "out_index"} & _argument_names(node):
        node = next(i for i in _tensor_inputs(node))
    found = arguments(node)
    return int(found["out_index"] if "out_index" in found else found["index"])


def _argument_names(node: Node) -> set[str]:
    schema = getattr(node.target, "_schema", None)
    fxquant_op = str(node.target).startswith("fxquant.")
    return {a.name for a in schema.arguments} if schema and fxquant_op else set()


def _tensor_inputs(node: Node) -> Iterator[Node]:
    return (i for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor))


def _evaluate(lowered: GraphModule, node: Node, expected: _Expected) -> Tensor:
    args, kwargs = map_arg((node.args, node.kwargs), expected)
    assert callable(node.target)
    result: Tensor = node.target(*args, **kwargs)
    return result


def _difference(node: Node, result: Tensor, expected: Tensor) -> Difference:
    integer = result.dtype in _INTEGERS
    if integer:
        error = float((result.int() - expected.int()).abs().max())
    else:
        a, b = result.double(), expected.double()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    name = str(node.target).removesuffix(".default")
    return Difference(node.name, name, integer, error)
