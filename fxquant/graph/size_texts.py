"""sympy's expressions over sizes as the text that fxquant.graph.size_expressions reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import sympy
from sympy.core.sorting import default_sort_key
from torch.utils._sympy import functions as torch_sympy

_Printed: TypeAlias = tuple[str, int]  # a text and how tightly it binds
_OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _UNARY, _POWER, _ATOM = range(9)

_INFIX: dict[str, tuple[str, int]] = {
    "FloorDiv": ("//", _PRODUCT),
    "CleanDiv": ("//", _PRODUCT),
    "IntTrueDiv": ("/", _PRODUCT),
    "FloatTrueDiv": ("/", _PRODUCT),
    "Mod": ("%", _PRODUCT),
    "PythonMod": ("%", _PRODUCT),
    "Equality": ("==", _COMPARE),
    "Unequality": ("!=", _COMPARE),
    "StrictLessThan": ("<", _COMPARE),
    "LessThan": ("<=", _COMPARE),
    "StrictGreaterThan": (">", _COMPARE),
    "GreaterThan": (">=", _COMPARE),
}
_JOINED = {"And": ("and", _AND), "Or": ("or", _OR)}
_FUNCTIONS = {
    "Max": "max",
    "Min": "min",
    "TruncToInt": "trunc",
    "FloorToInt": "floor",
    "floor": "floor",
    "CeilToInt": "ceil",
    "ceiling": "ceil",
    "RoundToInt": "round",
    "ToFloat": "float",
    "OpaqueUnaryFn_sqrt": "sqrt",
    "Abs": "abs",
    "Where": "where",
    "BitwiseFn_bitwise_and": "bitand",
    "BitwiseFn_bitwise_or": "bitor",
    "BitwiseFn_bitwise_xor": "bitxor",
}


def to_text(expression: sympy.Basic, names: Mapping[sympy.Symbol, str]) -> str:
    """The text of a size or a condition over sizes.

    Args:
        names: what its symbols are called.

    Raises:
        ValueError: it has a symbol without a name, or a function that the texts lack.
    """
    return _Printer(names).printed(expression)[0]


class _Printer:
    def __init__(self, names: Mapping[sympy.Symbol, str]):
        self._names = names
        self._kinds: dict[str, Callable[[Any], _Printed]] = {
            "Add": self._sum,
            "Mul": self._product,
            "Pow": self._power,
            "PowByNatural": self._power,
            "FloatPow": self._power,
            "Not": lambda e: (f"not {self._in(e.args[0], _NOT)}", _NOT),
            "Identity": lambda e: self.printed(e.args[0]),
            "TruncToFloat": lambda e: (f"float(trunc({self._in(e.args[0])}))", _ATOM),
            "ModularIndexing": self._modular,
            "LShift": lambda e: self._shifted(e, "*"),
            "RShift": lambda e: self._shifted(e, "//"),
        }

    def printed(self, e: Any) -> _Printed:
        """Text and binding of any expression."""
        kind = type(e).__name__
        if e.is_Symbol:
            return self._name(e), _ATOM
        if e.is_number and isinstance(e, (sympy.Integer, sympy.Float, sympy.Rational)):
            return self._number(e)
        if e in (sympy.true, sympy.false):
            return str(bool(e)), _ATOM
        if kind in self._kinds:
            return self._kinds[kind](e)
        if kind in _INFIX:
            return self._infix(e, *_INFIX[kind])
        arguments = sorted(e.args, key=default_sort_key)  # sets, of which And, Max are made
        if kind in _JOINED:
            word, level = _JOINED[kind]
            return f" {word} ".join(self._in(a, level + 1) for a in arguments), level
        if kind in _FUNCTIONS:
            in_order = e.args if kind == "Where" else arguments
            return f"{_FUNCTIONS[kind]}({', '.join(map(self._in, in_order))})", _ATOM
        raise ValueError(f"{e} has a {kind}, which sizes cannot be said with")

    def _in(self, e: Any, level: int = _OR) -> str:
        """An operand of something that binds at `level`."""
        text, binding = self.printed(e)
        return text if binding >= level else f"({text})"

    def _name(self, symbol: sympy.Symbol) -> str:
        if symbol not in self._names:
            raise ValueError(f"{symbol} is no size of an input")
        return self._names[symbol]

    def _number(self, e: Any) -> _Printed:
        if e.is_Rational and not e.is_Integer:
            text = f"{abs(e.p)} / {e.q}"
            return (f"-({text})", _UNARY) if e < 0 else (text, _PRODUCT)
        text = str(int(abs(e))) if e.is_Integer else repr(float(abs(e)))
        if not text[0].isdigit():
            raise ValueError(f"{e} is no number of a size")
        return (f"-{text}", _UNARY) if e < 0 else (text, _ATOM)

    def _infix(self, e: Any, sign: str, level: int) -> _Printed:
        left, right = e.args
        if level == _COMPARE:
            left, right = _whole(left, right)
        # `a // b // c` is (a // b) // c, and comparisons do not chain
        first = self._in(left, level + (level == _COMPARE))
        return f"{first} {sign} {self._in(right, level + 1)}", level

    def _sum(self, e: Any) -> _Printed:
        numerator, denominator = e.as_numer_denom()
        if denominator != 1 and not e.has(sympy.Float):
            return self._quotient(numerator, denominator)
        text = ""
        for term in e.as_ordered_terms():
            is_negative = term.could_extract_minus_sign()
            printed = self._in(-term if is_negative else term, _PRODUCT)
            if text:
                text += f" {'-' if is_negative else '+'} {printed}"
            else:
                text = f"-{self._in(-term, _UNARY)}" if is_negative else printed
        return text, _SUM

    def _product(self, e: Any) -> _Printed:
        numerator, denominator = e.as_numer_denom()
        if denominator != 1 and not e.has(sympy.Float):
            return self._quotient(numerator, denominator)
        factor, rest = e.as_coeff_Mul()
        if factor.is_negative:
            return f"-{self._in(-e, _UNARY)}", _UNARY
        factors = [factor] if factor != 1 else []
        factors += rest.as_ordered_factors()
        # `%` and `//` bind as `*` does: 2 * h // 3 is another number than 2 * (h // 3)
        return " * ".join(self._in(f, _UNARY) for f in factors), _PRODUCT

    def _quotient(self, numerator: Any, denominator: Any) -> _Printed:
        """A size that sympy knows to be whole: it divides where a guard says that it can."""
        return f"{self._in(numerator, _UNARY)} // {self._in(denominator, _UNARY)}", _PRODUCT

    def _power(self, e: Any) -> _Printed:
        base, exponent = e.args
        if exponent.is_negative and exponent.is_Integer:
            return self._quotient(sympy.S.One, base**-exponent)
        return f"{self._in(base, _ATOM)} ** {self._in(exponent, _ATOM)}", _POWER

    def _modular(self, e: Any) -> _Printed:
        base, divisor, modulus = e.args
        return self.printed(torch_sympy.Mod(torch_sympy.FloorDiv(base, divisor), modulus))

    def _shifted(self, e: Any, sign: str) -> _Printed:
        base, bits = e.args
        return f"{self._in(base, _UNARY)} {sign} 2 ** {self._in(bits, _ATOM)}", _PRODUCT


def _whole(left: Any, right: Any) -> tuple[Any, Any]:
    """Both sides without fractions: h/2 == 3/2 is h == 3, where h//2 == 3//2 would be another."""
    if left.has(sympy.Float) or right.has(sympy.Float):
        return left, right
    divisors = [side.as_numer_denom()[1] for side in (left, right)]
    common = sympy.ilcm(*divisors) if all(d.is_Integer for d in divisors) else 1
    return (left, right) if common == 1 else ((left * common).expand(), (right * common).expand())
