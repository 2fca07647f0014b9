"""Which values of a graph carry samples."""

from __future__ import annotations

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_symbols


def has_samples(node: Node) -> bool:
    """Does the first dimension grow with the batch?

    Learned tokens and means over the batch do not. Where the batch has a fixed size nobody knows,
    and shapes have to tell: yes.
    """
    first = next(n for n in node.graph.nodes if n.op == "placeholder")
    given, shape = first.meta["val"].shape, node.meta["val"].shape
    is_free = bool(given) and bool(free_symbols(given[0]))
    return not is_free or bool(shape and free_symbols(shape[0]))
