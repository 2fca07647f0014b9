"""Sizes that count something: how many elements of a mask are true is known when a model serves.

Such a size has no example. Where an operator that counts elements makes it, it is at most their
number, and that is the example: a saved graph may have it. What else makes sizes of values (lengths
that are summed up, numbers of repeats) has no bound and is refused.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from fxquant.errors import ArtifactError
from fxquant.graph.nodes import aten

_COUNTING = frozenset({aten.index.Tensor, aten.masked_select.default, aten.nonzero.default})


class Counts:
    """The most that the sizes of a graph can be which depend on values."""

    def __init__(self) -> None:
        self._most: dict[sympy.Symbol, sympy.Integer] = {}

    def see(self, node: Node) -> None:
        """Learn the sizes that a node makes, whose value has just been computed."""
        value = node.meta["val"]
        if node.target not in _COUNTING or not isinstance(value, Tensor):
            return
        given = [n.meta["val"] for n in node.all_input_nodes]
        shapes = [v.shape for v in given if isinstance(v, Tensor)]
        most = max(math.prod(self.example(size) for size in shape) for shape in shapes)
        sizes: tuple[Any, ...] = tuple(value.shape)
        for size in sizes:
            if isinstance(size, torch.SymInt) and not size.node.has_hint():
                for symbol in size.node.expr.free_symbols:
                    self._most.setdefault(symbol, sympy.Integer(most))

    def example(self, size: Any) -> int:
        """The example of a size; for a count, the most it can be.

        Raises:
            ArtifactError: it depends on values, and nothing bounds it.
        """
        if isinstance(size, int):
            return size
        if size.node.has_hint():
            return int(size.node.hint)
        environment = size.node.shape_env
        values = {**environment.backed_var_to_val, **self._most}
        found = environment.replace(size.node.expr).xreplace(values)
        if not found.is_number:
            raise ArtifactError("gives a tensor whose size depends on values")
        return int(found)
