"""Sizes of a graph's inputs in a saved model: 4, "B", "8*h", "2*w+1".

A symbol stands for a size that calls may choose: B batch, h and w the free factors of height and
width, L prompt length. Each comes with the range it was captured with, [low, high or null].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fxquant.errors import ArtifactError
from fxquant.runtime.fields import Field

SYMBOL = re.compile(r"[A-Za-z][0-9]{0,3}")
_SIZE = re.compile(r"(?:([0-9]{1,9})\*)?([A-Za-z][0-9]{0,3})(?:([+-])([0-9]{1,9}))?")
_LARGEST = 2**31 - 1
_MOST_SYMBOLS = 32


def describe(inputs: Iterable[Tensor]) -> tuple[dict[str, list[int | None]], list[list[int | str]]]:
    """Ranges by symbol, and the shape of every input.

    Raises:
        ArtifactError: a size that is not a multiple of one symbol plus a constant.
    """
    names: dict[sympy.Symbol, str] = {}
    shapes: list[list[int | str]] = []
    ranges: dict[str, list[int | None]] = {}
    for value in inputs:
        for size, letter in zip(value.shape, _letters(value.ndim), strict=True):
            for symbol in _symbols(size):
                if symbol not in names:
                    names[symbol] = _fresh(letter, names.values())
                    ranges[names[symbol]] = _range(size, symbol)
        shapes.append([_written(size, names) for size in value.shape])
    return ranges, shapes


def _letters(rank: int) -> Sequence[str]:
    known = "BChw" if rank == 4 else "BLC"
    return [known[i] if i < len(known) else "s" for i in range(rank)]


def _fresh(letter: str, taken: Iterable[str]) -> str:
    used = set(taken)
    return next(n for n in (letter, *(f"{letter}{k}" for k in range(1, 1000))) if n not in used)


def _symbols(size: Any) -> list[sympy.Symbol]:
    if not isinstance(size, torch.SymInt):
        return []
    return sorted(size.node.expr.free_symbols, key=str)


def _range(size: Any, symbol: sympy.Symbol) -> list[int | None]:
    found = size.node.shape_env.var_to_range[symbol]
    return [int(found.lower), None if found.upper > _LARGEST else int(found.upper)]


def _written(size: Any, names: Mapping[sympy.Symbol, str]) -> int | str:
    symbols = _symbols(size)
    if not symbols:
        return int(size)
    symbol, *others = symbols
    expression = size.node.expr
    factor, rest = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
    linear = not others and sympy.expand(factor * symbol + rest - expression) == 0
    if not linear or not factor.is_Integer or not rest.is_Integer or factor < 1:
        raise ArtifactError(f"the saved form cannot express the input size {expression}")
    text = names[symbol] if factor == 1 else f"{factor}*{names[symbol]}"
    return text if rest == 0 else f"{text}{int(rest):+d}"


class Symbols:
    """Fresh symbolic sizes for a graph that is read."""

    def __init__(self, ranges: Field):
        self.environment = ShapeEnv()
        self._known: dict[str, Any] = {}
        self._used: set[int] = set()
        for name, bounds in ranges.members(_MOST_SYMBOLS).items():
            if not SYMBOL.fullmatch(name):
                bounds.fail("a symbol is a letter and up to three digits")
            low, high = bounds.items(count=2)
            self._known[name] = self._create(name, low, high)

    def _create(self, name: str, low_field: Field, high_field: Field) -> Any:
        low = low_field.integer(0, _LARGEST)
        high = None if high_field.value is None else high_field.integer(low + 1, _LARGEST)
        # At the least size that a graph takes some size inside is 1, and taken for a constant: four
        # times as much leaves more than that even where the graph halves it twice.
        roomy = 4 * low if low > 2 and high is None else low
        example = self._example(max(2, roomy), high)
        if example is None:
            high_field.fail("leaves no size of two or more")
        source = ConstantSource(f"size_{name}")
        bounds = ValueRanges(max(2, low), int_oo if high is None else high)
        symbol = self.environment.create_symbol(
            example, source, DimDynamic.DYNAMIC, StrictMinMaxConstraint(vr=bounds, warn_only=False)
        )
        return self.environment.create_symintnode(symbol, hint=example, source=source)

    def _example(self, low: int, high: int | None) -> int | None:
        """A size in the range, unlike the others: equal ones might be taken for the same."""
        stop = low + 2 * _MOST_SYMBOLS if high is None else high + 1
        free = (n for n in range(low, stop) if n not in self._used)
        example = next(free, low if low < stop else None)
        if example is not None:
            self._used.add(example)
        return example

    def size(self, field: Field) -> Any:
        """The int or SymInt that a size says."""
        if type(field.value) is int:
            return field.integer(0, _LARGEST)
        match = _SIZE.fullmatch(field.text(limit=32))
        if match is None or match[2] not in self._known:
            field.fail(f"{field.value!r} is not a size such as 4, B or 8*h of a declared symbol")
        factor, symbol, sign, rest = match.groups()
        size = int(factor or 1) * self._known[symbol]
        return size + int(f"{sign}{rest}") if rest else size


def placeholders(gm: GraphModule) -> list[Any]:
    """The graph's inputs, in order."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
