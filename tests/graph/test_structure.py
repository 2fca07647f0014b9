"""Nested arguments are taken apart and put together as they were."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import CallError
from fxquant.graph.structure import (
    FlatCall,
    constant_from_json,
    constant_to_json,
    from_json,
    put_together,
    taken_apart,
    to_json,
)

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats()
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and repr(a) == repr(b)


@given(NESTED)
def test_what_is_taken_apart_is_put_together(value: Any) -> None:
    skeleton, leaves = taken_apart("x", value)
    if len(leaves) == repr(skeleton).count("'x"):  # keys 1 and "1" would have one name
        again = from_json(json.loads(json.dumps(to_json(skeleton))))
        assert same(put_together(again, leaves), value)


@given(LEAVES | st.complex_numbers() | st.sampled_from([torch.float16, torch.device("cuda:1")]))
def test_constants_survive_json(value: Any) -> None:
    text = json.dumps(constant_to_json(value), allow_nan=False)
    assert same(constant_from_json(json.loads(text)), value)


@pytest.mark.parametrize("value", [{"dtype": "nn"}, {"device": "x"}, [], {"float": "1"}, {}])
def test_other_json_is_no_constant(value: Any) -> None:
    with pytest.raises(ValueError, match="no constant"):
        constant_from_json(value)


@pytest.mark.parametrize("value", [1, ["set", []], ["dict", [["a"]]], ["list", [[None, "x"]]]])
def test_other_json_is_no_skeleton(value: Any) -> None:
    with pytest.raises(ValueError, match="no skeleton"):
        from_json(value)


def test_numpy_becomes_torch_and_python() -> None:
    call = FlatCall.of({"a": np.ones(2, np.float32), "b": [np.int64(3)]})
    assert torch.equal(call.tensors["a"], torch.ones(2))
    assert same(call.constants["b.0"], 3)
    assert list(call.leaves) == ["a", "b.0"]


def test_lists_are_new_ones_that_the_callee_may_change() -> None:
    call = FlatCall.of({"residuals": [torch.ones(1)]})
    call.arguments()["residuals"].pop()
    assert len(call.arguments()["residuals"]) == 1


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {"a": {None: 1}}])
def test_what_is_no_argument_is_refused_by_name(value: Any) -> None:
    with pytest.raises(CallError, match="x"):
        taken_apart("x", value)
