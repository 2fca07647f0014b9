"""What sizes a captured graph takes, as text that can be saved and checked again.

Each dimension of an input is a number, or an expression over named sizes: B batch, h and w the free
factors of height and width, L prompt length. Beside them stand *guards*: what the model's own code
asked of these sizes while it was captured, and found to be true. A call for which one is false
would have gone another way through the model, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from fxquant.errors import CallError
from fxquant.graph import size_expressions

Dimension = int | str
_LINEAR = re.compile(r"(?:([0-9]{1,9})\*)?([A-Za-z][0-9]{0,3})(?:([+-])([0-9]{1,9}))?")
_REMEMBERED = 64  # shapes of calls found to fit


@dataclass(frozen=True)
class Guard:
    """One question that the model asked.

    Attributes:
        text: in the words of `size_expressions`.
        place: file, line and function of the model that asked, "" if unknown.
    """

    text: str
    place: str = ""


class Limits:
    """The sizes that calls may have.

    Args:
        shapes: of every input, a Dimension for each of its dimensions; () checks nothing.
        guards: what must be true of the named sizes.
    """

    def __init__(
        self, shapes: Iterable[Sequence[Dimension]] = (), guards: Iterable[Guard] = ()
    ) -> None:
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.guards = tuple(guards)
        self._accepted: set[tuple[torch.Size, ...]] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Limits) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Limits({self.shapes}, {self.guards})"

    @property
    def _key(self) -> tuple[object, ...]:
        return self.shapes, self.guards

    def check(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Raise CallError where tensors have shapes that the graph does not take.

        Args:
            names: of the inputs, for the message.
        """
        key = tuple(tensor.shape for tensor in tensors)
        is_traced = any(isinstance(size, torch.SymInt) for shape in key for size in shape)
        if not self.shapes or (not is_traced and key in self._accepted):
            return
        values = self._sizes(names, key)
        broken = self._broken(values)
        if broken:
            raise CallError(
                f"a call with {_said(names, key)} goes another way through the model than the "
                f"calibration calls did: {broken[0].place or 'it'} asks whether {broken[0].text} "
                f"({_values(broken[0], values)}). Compile with a calibration call of these sizes "
                "among the others, or a model of its own for them"
            )
        if not is_traced and len(self._accepted) < _REMEMBERED:
            self._accepted.add(key)

    def broken(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Guard]:
        """The guards that are false for a call whose shapes fit.

        Raises:
            CallError: the shapes do not fit.
        """
        return self._broken(self._sizes(names, [t.shape for t in tensors]))

    def without(self, guards: Iterable[Guard]) -> Limits:
        """The same without these guards."""
        gone = set(guards)
        return Limits(self.shapes, [g for g in self.guards if g not in gone])

    def batch_factors(self) -> list[int]:
        """By input, how many rows of its first dimension belong to each sample: 1, more where
        frames are folded into the batch, 0 where there is no batch in it."""
        if not self.shapes or not self.shapes[0] or isinstance(self.shapes[0][0], int):
            return [int(k == 0) for k in range(len(self.shapes))]
        batch = self.shapes[0][0]
        return [_factor(shape[0], batch) if shape else 0 for shape in self.shapes]

    def apart_from_batch(self) -> list[bool]:
        """By input, whether its shape may stay as it is while the batch changes."""
        if not self.shapes or not self.shapes[0] or isinstance(self.shapes[0][0], int):
            return [False] * len(self.shapes)
        linked = _names(self.shapes[0][0])
        for guard in self.guards:
            if _names(guard.text) & _names(self.shapes[0][0]):
                linked |= _names(guard.text)
        return [not any(_names(str(size)) & linked for size in shape) for shape in self.shapes]

    def _sizes(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The named sizes of a call, whose every dimension is as it should be."""
        values: dict[str, int] = {}
        origin: dict[str, str] = {}
        later: list[tuple[str, Sequence[int], int, str]] = []
        for name, shape, dimensions in zip(names, shapes, self.shapes, strict=True):
            for axis, (size, dimension) in enumerate(zip(shape, dimensions, strict=True)):
                if isinstance(dimension, int):
                    if size != dimension:
                        raise _misfit(name, shape, axis, f"{dimension}, as captured")
                    continue
                match = _LINEAR.fullmatch(dimension)
                if match is None or match[2] in values:
                    later.append((name, shape, axis, dimension))
                    continue
                factor, rest = int(match[1] or 1), int(f"{match[3] or '+'}{match[4] or 0}")
                if size <= 0 or size < rest or (size - rest) % factor:
                    more = f" plus {rest}" if rest else ""
                    raise _misfit(name, shape, axis, f"a positive multiple of {factor}{more}")
                values[match[2]], origin[match[2]] = (size - rest) // factor, name
        for name, shape, axis, dimension in later:
            expected = _value(dimension, values)
            if shape[axis] != expected:
                others = sorted({origin[n] for n in _names(dimension) if n in origin} - {name})
                goes = f", to go with {' and '.join(others)}" if others else ""
                raise _misfit(name, shape, axis, f"{expected}{goes}")
        return values

    def _broken(self, values: Mapping[str, int]) -> list[Guard]:
        return [g for g in self.guards if not _holds(g, values)]


def limits_of(
    inputs: Iterable[Any],
    names: Mapping[sympy.Symbol, str] | None = None,
    guards: Iterable[Guard] = (),
) -> Limits:
    """Limits from the symbolic shapes of a graph's inputs, whose symbols may have names already."""
    inputs = list(inputs)
    names = size_names(inputs) if names is None else names
    return Limits([[written(s, names) for s in value.shape] for value in inputs], guards)


def size_names(inputs: Iterable[Any]) -> dict[sympy.Symbol, str]:
    """A name for every symbol in the shapes of a graph's inputs."""
    names: dict[sympy.Symbol, str] = {}
    for value in inputs:
        for size, letter in zip(value.shape, _letters(value.ndim), strict=True):
            for symbol in _symbols(size):
                if symbol not in names:
                    names[symbol] = _fresh(letter, names.values())
    return names


def written(size: Any, names: Mapping[sympy.Symbol, str]) -> Dimension:
    """A size as a Dimension."""
    if not _symbols(size):
        return int(size)
    expression = sympy.expand(size.node.expr)
    symbols = sorted(expression.free_symbols, key=str)
    if len(symbols) == 1:
        factor, rest = expression.coeff(symbols[0], 1), expression.coeff(symbols[0], 0)
        linear = sympy.expand(factor * symbols[0] + rest - expression) == 0
        if linear and factor.is_Integer and rest.is_Integer and factor >= 1:
            text = names[symbols[0]] if factor == 1 else f"{factor}*{names[symbols[0]]}"
            return text if rest == 0 else f"{text}{int(rest):+d}"
    return size_expressions.to_text(size.node.expr, names)


def _symbols(size: Any) -> list[sympy.Symbol]:
    if not isinstance(size, torch.SymInt):
        return []
    return sorted(size.node.expr.free_symbols, key=str)


def _letters(rank: int) -> Sequence[str]:
    known = {4: "BChw", 5: "BCFhw"}.get(rank, "BLC")
    return [known[i] if i < len(known) else "s" for i in range(rank)]


def _fresh(letter: str, taken: Iterable[str]) -> str:
    used = set(taken)
    return next(n for n in (letter, *(f"{letter}{k}" for k in range(1, 1000))) if n not in used)


def _factor(dimension: Dimension, batch: Dimension) -> int:
    if dimension == batch:
        return 1
    match = _LINEAR.fullmatch(str(dimension))
    if match is None or match[2] != batch or match[4]:
        return 0
    return int(match[1] or 1)


_texts: dict[str, size_expressions.Expression] = {}


def _parsed(text: str) -> size_expressions.Expression:
    """Once for each text; not by lru_cache, of which torch.compile warns."""
    if text not in _texts:
        _texts[text] = size_expressions.parse(text)
    return _texts[text]


def _names(text: str) -> frozenset[str]:
    return size_expressions.names_in(_parsed(text))


def _value(text: str, values: Mapping[str, int]) -> Any:
    return size_expressions.evaluate(_parsed(text), values)


def _holds(guard: Guard, values: Mapping[str, int]) -> bool:
    try:
        return bool(_value(guard.text, values))
    except ValueError:  # has no value at these sizes: a division by zero, say
        return False


def _values(guard: Guard, values: Mapping[str, int]) -> str:
    return ", ".join(f"{n} = {values[n]}" for n in sorted(_names(guard.text)) if n in values)


def _said(names: Sequence[str], shapes: Iterable[Sequence[int]]) -> str:
    return ", ".join(f"{n} {list(s)}" for n, s in zip(names, shapes, strict=True))


def _misfit(name: str, shape: Sequence[int], axis: int, wanted: str) -> CallError:
    return CallError(f"{name} has shape {tuple(shape)}; its dimension {axis} must be {wanted}")


__all__ = ["Dimension", "Guard", "Limits", "limits_of", "size_names", "written"]
