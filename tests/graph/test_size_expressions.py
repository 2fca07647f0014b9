"""Size expressions: sympy's become texts, texts become trees, and all have the same values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as f

from fxquant.graph.size_expressions import evaluate, is_condition, names_in, parse, to_text

SYMBOLS = sympy.symbols("s0 s77 u3", integer=True, positive=True)
NAMES = dict(zip(SYMBOLS, ("B", "h", "_w1"), strict=True))
h, w = SYMBOLS[1:]
VALUES = {"h": 12, "_w1": 5}
SIZES = st.tuples(*[st.integers(1, 200)] * 3)


def _built(kind: Callable[..., Any], *parts: Any) -> Any:
    try:
        return kind(*parts)
    except ZeroDivisionError:
        return parts[0]


def _numbers(inner: Any) -> Any:
    """Whole numbers over SYMBOLS as torch writes them."""
    nonzero = st.integers(1, 9).map(sympy.Integer)
    two = [operator.add, operator.sub, operator.mul, f.Max, f.Min]
    return st.one_of(
        st.builds(_built, st.sampled_from(two), inner, inner),
        st.builds(_built, st.sampled_from([f.FloorDiv, f.PythonMod]), inner, nonzero),
        st.builds(f.PowByNatural, inner, st.integers(1, 2).map(sympy.Integer)),
        st.builds(lambda a, n: f.TruncToInt(f.IntTrueDiv(a, n)), inner, nonzero),
        st.builds(lambda a, n: f.CeilToInt(f.IntTrueDiv(a, n)), inner, nonzero),
        st.builds(lambda a: f.RoundToInt(f.ToFloat(a) * sympy.Float(0.75)), inner),
    )


LEAVES = st.one_of(st.sampled_from(SYMBOLS), st.integers(-20, 20).map(sympy.Integer))
NUMBERS = st.recursive(LEAVES, _numbers, max_leaves=8)
RELATIONS = st.sampled_from([sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge])
CONDITIONS = st.recursive(
    st.builds(lambda relation, a, b: relation(a, b), RELATIONS, NUMBERS, NUMBERS),
    lambda c: st.one_of(c.map(sympy.Not), st.builds(sympy.And, c, c), st.builds(sympy.Or, c, c)),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(expression=st.one_of(NUMBERS, CONDITIONS), sizes=SIZES)
def test_texts_have_the_value_of_the_sympy_expression(
    expression: sympy.Basic, sizes: tuple[int, int, int]
) -> None:
    values = dict(zip(NAMES.values(), sizes, strict=True))
    truth = expression.subs(dict(zip(SYMBOLS, sizes, strict=True)))
    found = evaluate(parse(to_text(expression, NAMES)), values)
    assert type(found) is (bool if truth.is_Boolean else int)
    assert found == (bool(truth) if truth.is_Boolean else int(truth))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (8 * h + 1, "8 * h + 1"),
        (3 - h, "3 - h"),
        (2 * f.FloorDiv(h, 3), "2 * (h // 3)"),
        (f.FloorDiv(h * w, 4), "h * _w1 // 4"),
        (f.CleanDiv(h, 4), "h // 4"),
        (h / 2, "h // 2"),
        (sympy.Eq(f.Mod(h, 4), 0), "h % 4 == 0"),
        (sympy.Eq(h / 2, sympy.Rational(3, 2)), "h == 3"),
        (f.TruncToInt(f.FloatPow(f.ToFloat(h), sympy.Float(0.5))), "trunc(float(h) ** 0.5)"),
        (f.ModularIndexing(h, 2, 3), "h // 2 % 3"),
        (sympy.Not(sympy.Or(h > 3, w > 4)), "not (h > 3 or _w1 > 4)"),
        (f.Where(h > 3, h, w), "where(h > 3, h, _w1)"),
        (sympy.true, "True"),
    ],
)  # fmt: skip
def test_texts_read_like_python(expression: sympy.Basic, text: str) -> None:
    assert to_text(expression, NAMES) == text


@pytest.mark.parametrize(
    "text",
    [
        "h - _w1 - 3", "-h // 5", "-(h // 5)", "h // -5 % 3", "2 * h // 5", "h % 5 * 2",
        "-h ** 2", "(-h) ** 2", "h / 8 * 8", "h / 5 > 2.4", "not h == _w1 and h > 1e1 or h < 0",
        "not (h == _w1 and h > 10)", "max(h, _w1 + 8, 3) - min(h, 2)", "abs(_w1 - h)",
        "round(h / 8)", "round(_w1 / 2) + 0.5 * 2 == 3.0", "True", "h > 3 and True",
        "float(h) == 12", "trunc(-h / 5)", "floor(-h / 5)", "ceil(h / 5)", " h+ 1 ",
    ],
)  # fmt: skip
def test_words_mean_what_they_mean_in_python(text: str) -> None:
    functions = {"trunc": math.trunc, "floor": math.floor, "ceil": math.ceil}
    truth = eval(text.strip(), functions | VALUES)
    found = evaluate(parse(text), VALUES)
    assert found == truth
    assert is_condition(parse(text)) == isinstance(truth, bool)


def test_the_rest_of_a_condition_is_not_asked() -> None:
    assert evaluate(parse("n != 0 and 8 // n == 2"), {"n": 0}) is False
    assert evaluate(parse("n == 0 or 8 // n == 2"), {"n": 0}) is True


def test_names_are_found() -> None:
    assert names_in(parse("max(h, 3) * w // (B + 1) == -c")) == {"h", "w", "B", "c"}
    assert names_in(parse("3")) == frozenset()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "at character 0 .*expected"),
        ("h +", "at character 3"),
        ("h h", "at character 2 .*'h' follows"),
        ("h.real", "at character 1 .*'.' is no part"),
        ("__import__('os')", "at character 11 .*is no part"),
        ("print(h)", "follows"),
        ("h[0]", "is no part"),
        ("1 < h < 3", "at character 6 .*follows"),
        ("h and w", "at character 2 .*expected a condition, not a number"),
        ("(h == w) + 1", "expected a number, not a condition"),
        ("not h", "expected a condition"),
        ("-(h == w)", "expected a number"),
        ("max(h == w)", "expected a number"),
        ("where(h, 1, 2)", "expected a condition"),
        ("max()", "expected"),
        ("trunc(h, w)", "at character 0 .*trunc does not take 2"),
        ("h ** 2 ** 3", "follows"),
        ("and", "not 'and'"),
        ("0x10", "follows"),
        ("h # comment", "is no part"),
        ("9" * 41, "beyond all sizes"),
        ("2e99", "beyond all sizes"),
        ("(" * 41 + "h" + ")" * 41, "nested too deeply"),
        ("-" * 41 + "h", "nested too deeply"),
        ("not " * 41 + "h == 1", "nested too deeply"),
        ("h + " * 5000 + "h", "characters long"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [
                "h",
                "w",
                "3",
                "(",
                ")",
                "+",
                "-",
                "*",
                "//",
                "%",
                "==",
                "<",
                "and",
                "or",
                "not",
                "max",
                "**",
                ",",
                "0.5",
            ]
        )
    )
)
def test_no_text_does_worse_than_a_value_error(tokens: list[str]) -> None:
    try:
        evaluate(parse(" ".join(tokens)), {"h": 2, "w": 3})
    except ValueError:
        return


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("h // 0", "division"),
        ("h % (h - 12)", "modulo"),
        ("h / 5", "no whole number"),
        ("x + 1", "no size is called 'x'"),
        ("h ** 65", "exponent"),
        ("h ** h ", "beyond|exponent"),
        ("2 ** -1", "expected"),
        ("(0 - h) ** 0.5", "has no power"),
        ("h ** 60", "beyond all sizes"),
        ("1e30 * 1e30", "beyond all sizes"),
    ],
)
def test_values_that_no_size_has(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        evaluate(parse(text), {"h": 200 if "** h" in text else 12})


def test_long_sums_are_not_deep() -> None:
    assert evaluate(parse(" + ".join(["h"] * 4000)), {"h": 2}) == 8000


def test_what_texts_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="no size of an input"):
        to_text(sympy.Symbol("u9") + 1, NAMES)
    with pytest.raises(ValueError, match="cannot be said"):
        to_text(sympy.sin(h), NAMES)


def test_symbolic_sizes_give_symbolic_results() -> None:
    environment = ShapeEnv()
    size = environment.create_unbacked_symint()
    torch._check(size >= 2)
    found = evaluate(parse("max(2 * n // 3, 4) + 1"), {"n": size})
    assert isinstance(found, torch.SymInt)
    expected = f.Max(4, f.FloorDiv(2 * size.node.expr, 3)) + 1
    assert found.node.expr == expected
