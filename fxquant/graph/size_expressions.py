"""Arithmetic over sizes as text: `h % 4 == 0`, `max(2, h//2) * w <= 4096`.

What a captured graph asks of the sizes of its inputs is kept as text, which can be read, saved and
checked again. The words are Python's and so is their meaning:

    condition   = conjunction {"or" conjunction}        conjunction = negation {"and" negation}
    negation    = "not" negation | comparison           comparison  = sum [("==" | "<" ...) sum]
    sum         = product {("+" | "-") product}         product     = unary {("*" | "//" ...) unary}
    unary       = "-" unary | power                     power       = atom ["**" atom]
    atom        = number | name | True | False | function "(" condition {"," condition} ")"
                | "(" condition ")"

Nothing is executed: a text is parsed into a small tree and the tree is walked. Length, depth,
exponents and values are limited, so no text can be slow or large either.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NoReturn, TypeAlias

import torch

from fxquant.graph.size_texts import to_text

_LONGEST = 1 << 14
_DEEPEST = 40
_LARGEST = 2**127
_MOST_POWER = 64

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>\*\*|//|==|!=|<=|>=|[-+*/%<>(),]))"
)
_NUMBER_LENGTH = 40
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "/": operator.truediv,
    "%": operator.mod,
    "**": operator.pow,
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# From loose to tight: what binds alike, and if that may be repeated.
_LEVELS: tuple[tuple[frozenset[str], bool], ...] = (
    (frozenset({"or"}), True),
    (frozenset({"and"}), True),
    (frozenset(_COMPARISONS), False),
    (frozenset({"+", "-"}), True),
    (frozenset({"*", "//", "/", "%"}), True),
)
_NOT_LEVEL = 2  # `not` binds what a comparison is made of


@dataclass(frozen=True)
class Number:
    """A literal: 8, 0.5, True."""

    value: int | float | bool


@dataclass(frozen=True)
class Name:
    """A size by its name."""

    name: str


@dataclass(frozen=True)
class Unary:
    """`-operand` or `not operand`."""

    sign: str
    operand: Expression


@dataclass(frozen=True)
class Chain:
    """Operators that bind alike, from left to right: first + second - third."""

    first: Expression
    rest: tuple[tuple[str, Expression], ...]


@dataclass(frozen=True)
class Call:
    """A function of a few: max(a, b)."""

    function: str
    arguments: tuple[Expression, ...]


Expression: TypeAlias = Number | Name | Unary | Chain | Call


def _extreme(pick: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *values: reduce(pick, values)


@dataclass(frozen=True)
class _Function:
    compute: Callable[..., Any]
    least: int = 1
    most: int = 1


_FUNCTIONS = {
    "max": _Function(_extreme(torch.sym_max), 1, 64),
    "min": _Function(_extreme(torch.sym_min), 1, 64),
    "trunc": _Function(math.trunc),
    "floor": _Function(math.floor),
    "ceil": _Function(math.ceil),
    "round": _Function(round),
    "float": _Function(torch.sym_float),
    "sqrt": _Function(lambda x: torch.sym_float(x) ** 0.5),
    "abs": _Function(abs),
    "where": _Function(torch.sym_ite, 3, 3),
    "bitand": _Function(operator.and_, 2, 2),
    "bitor": _Function(operator.or_, 2, 2),
    "bitxor": _Function(operator.xor, 2, 2),
}
_RESERVED = frozenset({*_FUNCTIONS, "and", "or", "not", "True", "False"})


def parse(text: str) -> Expression:
    """The tree of a condition or a number.

    Raises:
        ValueError: what is wrong, and at which character of the text.
    """
    return _Parser(text).parse()


def names_in(expression: Expression) -> frozenset[str]:
    """Names of the sizes that it reads."""
    if isinstance(expression, Name):
        return frozenset({expression.name})
    return frozenset().union(*map(names_in, _parts(expression)))


def is_condition(expression: Expression) -> bool:
    """Is it true or false, rather than a number?"""
    if isinstance(expression, Number):
        return isinstance(expression.value, bool)
    if isinstance(expression, Unary):
        return expression.sign == "not"
    return isinstance(expression, Chain) and expression.rest[0][0] not in _ARITHMETIC


def evaluate(expression: Expression, values: Mapping[str, Any]) -> Any:
    """Its value: an int, or a bool for a condition. Symbolic sizes give symbolic results.

    Raises:
        ValueError: a name without a value, a division by zero, a number beyond all sizes, or a
            result that is no whole number.
    """
    try:
        value = _value(expression, values)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from error
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{value} is no whole number")
        return int(value)
    return value


def _parts(expression: Expression) -> tuple[Expression, ...]:
    if isinstance(expression, Unary):
        return (expression.operand,)
    if isinstance(expression, Chain):
        return (expression.first, *(operand for _, operand in expression.rest))
    return expression.arguments if isinstance(expression, Call) else ()


def _value(expression: Expression, values: Mapping[str, Any]) -> Any:
    if isinstance(expression, Number):
        return expression.value
    if isinstance(expression, Name):
        if expression.name not in values:
            raise ValueError(f"no size is called {expression.name!r}")
        return values[expression.name]
    if isinstance(expression, Unary):
        value = _value(expression.operand, values)
        return torch.sym_not(value) if expression.sign == "not" else -value
    if isinstance(expression, Chain):
        return _chained(expression, values)
    arguments = [_value(a, values) for a in expression.arguments]
    return _bounded(_FUNCTIONS[expression.function].compute(*arguments))


def _chained(chain: Chain, values: Mapping[str, Any]) -> Any:
    value = _value(chain.first, values)
    for sign, operand in chain.rest:
        if sign in ("and", "or"):
            if bool(value) == (sign == "or"):  # the rest may not have a value: n > 0 and m // n > 1
                return bool(value)
            value = _value(operand, values)
        else:
            value = _combined(sign, value, _value(operand, values))
    return value


def _combined(sign: str, left: Any, right: Any) -> Any:
    if sign in _COMPARISONS:
        return _COMPARISONS[sign](left, right)
    if sign == "**":
        _check_power(left, right)
    return _bounded(_ARITHMETIC[sign](left, right))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(exponent, (int, float)) and not 0 <= exponent <= _MOST_POWER:
        raise ValueError(f"{exponent} is no exponent from 0 to {_MOST_POWER}")
    if isinstance(exponent, float) and isinstance(base, (int, float)) and base < 0:
        raise ValueError(f"{base} has no power {exponent}")


def _bounded(value: Any) -> Any:
    """A number that sizes can have; symbolic ones are bounded where they are used."""
    if isinstance(value, (int, float)) and not -_LARGEST < value < _LARGEST:
        raise ValueError("is a number beyond all sizes")
    return value


class _Parser:
    """Precedence climbing over the tokens of one text."""

    def __init__(self, text: str):
        if len(text) > _LONGEST:
            raise ValueError(f"is {len(text)} characters long, {_LONGEST} are allowed")
        self._text = text
        self._tokens = list(self._read())
        self._at = 0
        self._depth = 0

    def _read(self) -> Iterator[tuple[str, str, int]]:
        """(kind, text, position) of every token, and one at the end."""
        at, end = 0, len(self._text.rstrip())
        while at < end:
            match = _TOKEN.match(self._text, at)
            if match is None or match.lastgroup is None:
                self._fail(f"{self._text[at:].lstrip()[:1]!r} is no part of an expression", at)
            yield match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)
            at = match.end()
        yield "end", "", end

    def parse(self) -> Expression:
        whole = self._chain(0)
        if self._kind != "end":
            self._fail(f"{self._token!r} follows a whole expression")
        return whole

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0]

    @property
    def _token(self) -> str:
        return self._tokens[self._at][1]

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _fail(self, complaint: str, position: int | None = None) -> NoReturn:
        at = self._tokens[self._at][2] if position is None else position
        raise ValueError(f"at character {at} of {self._text[:200]!r}: {complaint}")

    def _expect(self, token: str) -> None:
        if self._token != token:
            self._fail(f"expected {token!r}, not {self._token!r}")
        self._next()

    def _chain(self, level: int) -> Expression:
        if level == _NOT_LEVEL and self._token == "not":
            return self._negated("not", lambda: self._chain(level), conditions=True)
        if level == len(_LEVELS):
            return self._unary()
        signs, repeats = _LEVELS[level]
        first = self._chain(level + 1)
        rest: list[tuple[str, Expression]] = []
        while self._token in signs and (repeats or not rest):
            self._check_kind(rest[-1][1] if rest else first, level < _NOT_LEVEL)
            sign = self._next()
            operand = self._chain(level + 1)
            self._check_kind(operand, level < _NOT_LEVEL)
            rest.append((sign, operand))
        return Chain(first, tuple(rest)) if rest else first

    def _negated(
        self, sign: str, operand: Callable[[], Expression], *, conditions: bool
    ) -> Expression:
        self._deeper()
        self._next()
        inner = operand()
        self._check_kind(inner, conditions)
        self._depth -= 1
        return Unary(sign, inner)

    def _unary(self) -> Expression:
        if self._token == "-":
            return self._negated("-", self._unary, conditions=False)
        base = self._atom()
        if self._token != "**":
            return base
        self._check_kind(base, wanted=False)
        self._next()
        exponent = self._atom()
        self._check_kind(exponent, wanted=False)
        return Chain(base, (("**", exponent),))

    def _atom(self) -> Expression:
        if self._kind == "number":
            return self._number()
        if self._kind == "word":
            return self._word()
        self._expect("(")
        self._deeper()
        inner = self._chain(0)
        self._depth -= 1
        self._expect(")")
        return inner

    def _number(self) -> Expression:
        if len(self._token) > _NUMBER_LENGTH:
            self._fail("is a number beyond all sizes")
        value = int(self._token) if self._token.isdigit() else float(self._token)
        if value >= _LARGEST:
            self._fail("is a number beyond all sizes")
        self._next()
        return Number(value)

    def _word(self) -> Expression:
        word = self._token
        if word in ("True", "False"):
            self._next()
            return Number(word == "True")
        if word in _FUNCTIONS:
            return self._call()
        if word in _RESERVED:
            self._fail(f"expected a number, not {word!r}")
        self._next()
        return Name(word)

    def _call(self) -> Expression:
        start = self._tokens[self._at][2]
        name = self._next()
        function = _FUNCTIONS[name]
        self._expect("(")
        self._deeper()
        arguments = [self._argument(name, 0)]
        while self._token == ",":
            self._next()
            arguments.append(self._argument(name, len(arguments)))
        self._depth -= 1
        self._expect(")")
        if not function.least <= len(arguments) <= function.most:
            self._fail(f"{name} does not take {len(arguments)} arguments", start)
        return Call(name, tuple(arguments))

    def _argument(self, function: str, position: int) -> Expression:
        argument = self._chain(0)
        self._check_kind(argument, function == "where" and position == 0)
        return argument

    def _check_kind(self, part: Expression, wanted: bool) -> None:
        if is_condition(part) != wanted:
            names = ("a number", "a condition")
            self._fail(f"expected {names[wanted]}, not {names[not wanted]}")

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._fail("is nested too deeply")


__all__ = ["Expression", "evaluate", "is_condition", "names_in", "parse", "to_text"]
