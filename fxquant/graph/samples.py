"""Which values of a graph carry samples."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_symbols


def has_samples(node: Node) -> bool:
    """Does the first dimension grow with the batch, that of any of the inputs?

    Learned tokens and means over the batch do not, and neither does a table of positions: it is as
    long as some input has tokens. Where the batch has a fixed size nobody knows, and shapes have to
    tell: yes.
    """
    inputs = [n.meta["val"].shape for n in node.graph.nodes if n.op == "placeholder"]
    batch = free_symbols(inputs[0][0]) if inputs[0] else set()
    if not batch:
        return True
    shape = node.meta["val"].shape
    first = set().union(*(free_symbols(given[0]) for given in inputs if given))
    tokens = set().union(*(free_symbols(size) for given in inputs for size in given[1:]))
    return bool(shape) and bool(free_symbols(shape[0]) & (batch | (first - tokens)))


def is_by_sample(graph: Graph) -> bool:
    """Has everything that the graph returns one row for each sample?"""
    first = next(n for n in graph.nodes if n.op == "placeholder")
    output = next(iter(reversed(graph.nodes)))
    batch = str(first.meta["val"].shape[:1])
    values = [n.meta.get("val") for n in output.all_input_nodes]
    return all(isinstance(v, Tensor) and v.ndim and str(v.shape[:1]) == batch for v in values)
