"""The sizes a captured graph takes, and the refusal of others."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import CallError
from fxquant.graph.limits import Guard, Limits, limits_of
from tests.toy import story

NAMES = ("sample", "timestep", "text")


def toy_limits() -> Limits:
    graph = story()["capture"].graph
    return limits_of(n.meta["val"] for n in graph.nodes if n.op == "placeholder")


def call(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def test_channels_are_fixed_batch_free_and_size_free_in_steps():
    assert toy_limits().shapes == (("B", 4, "2*h", "2*w"), ("B",), ("B", "L", 16))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 8, 8), (2,), (2, 7, 16)), "sample has .*dimension 1 must be 4, as captured"),
        (((2, 4, 7, 8), (2,), (2, 7, 16)), "dimension 2 must be a positive multiple of 2"),
        (((0, 4, 8, 8), (0,), (0, 7, 16)), "dimension 0 must be a positive multiple of 1"),
        (((2, 4, 8, 8), (3,), (2, 7, 16)), "timestep .* 0 must be 2, to go with sample"),
        (((2, 4, 8, 8), (2,), (3, 7, 16)), "text .* 0 must be 2, to go with sample"),
    ],
)
def test_other_sizes_are_refused(shapes, message):
    limits = toy_limits()
    limits.check(NAMES, call((3, 4, 6, 10), (3,), (3, 5, 16)))
    with pytest.raises(CallError, match=message):
        limits.check(NAMES, call(*shapes))


def test_what_the_model_asked_must_be_true_of_every_call():
    guards = (Guard("B % 2 == 0", "model.py:7 in forward"), Guard("w < 8"), Guard("B // w > 0"))
    limits = Limits([("B", "w")], guards)
    limits.check(("x",), call((8, 7)))
    with pytest.raises(CallError, match=r"x \[9, 3\].*model.py:7 in forward asks whether B % 2"):
        limits.check(("x",), call((9, 3)))
    assert limits.broken(("x",), call((2, 9))) == [guards[1], guards[2]]
    assert limits.without([guards[0]]).broken(("x",), call((9, 3))) == []


def test_a_question_without_an_answer_is_not_true():
    limits = Limits([("B", "w")], (Guard("B // (w - 3) > 0"),))
    assert limits.broken(("x",), call((4, 3))) == [limits.guards[0]]


def test_sizes_made_of_others_are_compared():
    limits = Limits([("F*B",), ("B", "F")])
    limits.check(("rows", "x"), call((6,), (2, 3)))
    with pytest.raises(CallError, match=r"rows has .* must be 6, to go with x"):
        limits.check(("rows", "x"), call((5,), (2, 3)))


@pytest.mark.parametrize(
    ("shapes", "factors"),
    [
        ([("B", 4), ("8*B", 2), ("L", 3), (7,), ()], [1, 8, 0, 0, 0]),
        ([(2, 4), (2,)], [1, 0]),
        ([("2*B", 4), ("B",)], [1, 0]),
        ([], []),
    ],
)
def test_rows_of_each_sample(shapes, factors):
    assert Limits(shapes).batch_factors() == factors


def test_what_stays_while_the_batch_changes() -> None:
    """Neither a dimension nor a guard ties the input to the batch."""
    shapes = [("B", 4, "h"), ("s", 2), ("B+1", 2), ("s1",), (3,)]
    limits = Limits(shapes, [Guard("s1 > B"), Guard("s > 1")])
    assert limits.apart_from_batch() == [False, True, False, False, True]
    assert Limits([(2, 4), (3,)]).apart_from_batch() == [False, False]
