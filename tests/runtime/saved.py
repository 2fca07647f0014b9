"""Saved models for tests, and how to compare them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

import fxquant
from fxquant import QuantizedModel, Recipe
from tests import models
from tests.runtime import compiled as c


@functools.cache
def toy(name: str = "w8a8-fast", dtype: str = "float32", groups: int = 3) -> QuantizedModel:
    """The toy of tests.models with a table of several rows, compiled once."""
    recipe = Recipe.parse(name).with_(compute_dtype=dtype, timestep_groups=groups)
    return c.compiled(c.float_toy(), models.calls("toy", 6, batch=2), recipe)


@functools.cache
def mite(seed: int = 0) -> QuantizedModel:
    """The smallest model there is, compiled once for each seed of its weights."""
    return c.compile_mite("w8a8-fast", c.mite(seed))


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_same_tensors(a: QuantizedModel, b: QuantizedModel) -> None:
    """Bitwise, in name, dtype and kind."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert len(ours) > 0
    assert sorted(ours) == sorted(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    kinds = [sorted(name for name, _ in m.named_parameters()) for m in (a, b)]
    assert kinds[0] == kinds[1]


def check_same_results(a: QuantizedModel, b: QuantizedModel, call: c.Call) -> None:
    """Bitwise, on one call."""
    assert torch.equal(c.result(a, call), c.result(b, call))


def same_model(folder: Path, candidates: list[QuantizedModel]) -> QuantizedModel:
    """The candidate that is saved in the folder; it must be one of them."""
    loaded = fxquant.load(folder).state_dict()
    for candidate in candidates:
        ours = candidate.state_dict()
        if all(torch.equal(ours[name], loaded[name]) for name in ours):
            return candidate
    raise AssertionError("the folder holds none of these models")
