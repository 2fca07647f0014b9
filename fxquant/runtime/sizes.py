"""Sizes of a graph's inputs in a saved model: 4, "B", "8*h", "h*w//4", and what is true of them.

A symbol stands for a size that calls may choose: B batch, h and w the free factors of height and
width, L prompt length. Each comes with the range it was captured with and the example it had,
[low, high or null, example]. *Facts* are what the tracer found true of the sizes, "h % 2 == 0":
a graph whose sizes are even only because the model asked cannot be traced again without them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fxquant.errors import ArtifactError
from fxquant.graph.limits import size_names, written
from fxquant.graph.size_expressions import evaluate, is_condition, names_in, parse, to_text
from fxquant.runtime.fields import Field

SYMBOL = re.compile(r"[A-Za-z][0-9]{0,3}")
_LARGEST = 2**31 - 1
_MOST_SYMBOLS = 64
_MOST_FACTS = 4096
_LONGEST = 1024


@dataclass(frozen=True)
class Described:
    """The sizes of a graph's inputs as data.

    Attributes:
        symbols: range and example by symbol.
        facts: what is true of them.
        shapes: of every input.
    """

    symbols: dict[str, list[int | None]]
    facts: list[str]
    shapes: list[list[int | str]]


def describe(inputs: Iterable[Tensor]) -> Described:
    """What a saved model says about the sizes of these inputs.

    Raises:
        ArtifactError: a size that is no function of sizes which calls choose.
    """
    inputs = list(inputs)
    names = size_names(inputs)
    every: list[Any] = [size for value in inputs for size in value.shape]
    sizes = [size for size in every if isinstance(size, torch.SymInt)]
    environment = sizes[0].node.shape_env if sizes else None
    return Described(
        {name: _range(environment, symbol) for symbol, name in names.items()},
        _facts(environment, names) if environment is not None else [],
        [[_written(size, names) for size in value.shape] for value in inputs],
    )


def _range(environment: Any, symbol: sympy.Symbol) -> list[int | None]:
    found = environment.var_to_range[symbol]
    high = None if found.upper > _LARGEST else int(found.upper)
    return [int(found.lower), high, int(environment.backed_var_to_val[symbol])]


def _facts(environment: Any, names: Mapping[sympy.Symbol, str]) -> list[str]:
    """What was asked while tracing, as far as it is about the inputs: the rest is about nothing
    that a graph read again has."""
    found: dict[str, None] = {}
    for guard in environment.guards:
        expression = environment.replace(guard.expr)
        # Of `a or b` the example would teach one alone.
        if expression.free_symbols <= names.keys() and not expression.has(sympy.Or):
            try:
                text = to_text(expression, names)
            except ValueError:
                continue
            if expression.free_symbols and len(text) <= _LONGEST:
                found[text] = None
    return list(found)[:_MOST_FACTS]


def _written(size: Any, names: Mapping[sympy.Symbol, str]) -> int | str:
    try:
        return written(size, names)
    except ValueError as error:
        raise ArtifactError(f"the saved form cannot express an input size: {error}") from error


class Symbols:
    """Fresh symbolic sizes for a graph that is read."""

    def __init__(self, ranges: Field, facts: Field | None = None):
        self.environment = ShapeEnv()
        self._known: dict[str, Any] = {}
        self._used: set[int] = set()
        self._most: dict[Any, int] = {}
        for name, bounds in ranges.members(_MOST_SYMBOLS).items():
            if not SYMBOL.fullmatch(name):
                bounds.fail("a symbol is a letter and up to three digits")
            self._known[name] = self._create(name, *_bounds(bounds))
        for fact in facts.items(_MOST_FACTS) if facts else ():
            self._learn(fact)

    def _create(self, name: str, low: int, high: int | None, example: int | None) -> Any:
        if example is None:
            # At the least size that a graph takes some size inside is 1, and taken for a constant:
            # four times as much leaves more than that even where the graph halves it twice.
            roomy = 4 * low if low > 2 and high is None else low
            example = self._example(max(2, roomy), high)
        source = ConstantSource(f"size_{name}")
        bounds = ValueRanges(max(2, low), int_oo if high is None else high)
        symbol = self.environment.create_symbol(
            example, source, DimDynamic.DYNAMIC, StrictMinMaxConstraint(vr=bounds, warn_only=False)
        )
        return self.environment.create_symintnode(symbol, hint=example, source=source)

    def _example(self, low: int, high: int | None) -> int:
        """A size in the range, unlike the others: equal ones might be taken for the same."""
        stop = low + 2 * _MOST_SYMBOLS if high is None else high + 1
        example = next((n for n in range(low, stop) if n not in self._used), low)
        self._used.add(example)
        return example

    def _learn(self, field: Field) -> None:
        fact = self._value(field, condition=True)
        if not bool(fact):  # asking is what teaches the environment
            field.fail(f"{field.value!r} is false of the example sizes")

    def size(self, field: Field) -> Any:
        """The int or SymInt that a size says."""
        if type(field.value) is int:
            return field.integer(0, _LARGEST)
        size = self._value(field, condition=False)
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        if type(hint) is not int or not 0 <= hint <= _LARGEST:
            field.fail(f"{field.value!r} is no size")
        return size

    def bound(self, node: Node) -> None:
        """Remember how many values `nonzero` finds at most."""
        if node.target is not torch.ops.aten.nonzero.default:
            return
        found = node.meta["val"].shape[0]
        if isinstance(found, torch.SymInt) and not found.node.has_hint():
            searched = node.all_input_nodes[0].meta["val"].shape
            self._most[found.node.expr] = math.prod(max(1, self.example(n)) for n in searched)

    def example(self, size: Any) -> int:
        """What a size is in the example call; the most that it can be, if it depends on values.

        Raises ArtifactError where nobody knows.
        """
        if isinstance(size, int):
            return size
        if size.node.has_hint():
            return int(size.node.hint)
        known = self.environment.backed_var_to_val | self._most
        most = size.node.expr.subs(known)
        if not most.is_Integer:
            raise ArtifactError("gives a tensor whose size depends on values")
        return int(most)

    def _value(self, field: Field, condition: bool) -> Any:
        text = field.text(limit=_LONGEST)
        try:
            expression = parse(text)
            if is_condition(expression) != condition or not names_in(expression):
                raise ValueError("is no condition" if condition else "is no size")
            return evaluate(expression, self._known)
        except (ValueError, ArithmeticError) as error:
            field.fail(
                f"{text[:60]!r} is not what is said with declared symbols, "
                f"{'h % 2 == 0' if condition else 'B or 8*h'}: {error}"
            )


def _bounds(field: Field) -> tuple[int, int | None, int | None]:
    """Lowest, highest and example; the latter two may be missing."""
    items = field.items(limit=3)
    if len(items) < 2:
        field.fail("is not [low, high] or [low, high, example]")
    low = items[0].integer(0, _LARGEST)
    high = None if items[1].value is None else items[1].integer(max(low, 2), _LARGEST)
    if len(items) == 2:
        return low, high, None
    return low, high, items[2].integer(max(low, 2), _LARGEST if high is None else high)


def placeholders(gm: GraphModule) -> list[Any]:
    """The graph's inputs, in order."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
