"""Layers that share a weight round copies of their own; what else reads it keeps the floats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests.passes.small import FLOAT32, Model, assert_near, compiled, parameter
from tests.toy import golden, story


def tied() -> Model:
    model = Model(lambda m, x: m.b(F.silu(m.a(x))), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    model.b.weight = model.a.weight
    return model


def twice() -> Model:
    return Model(lambda m, x: m.a(F.silu(m.a(x))), a=nn.Linear(16, 16))


def also_summed() -> Model:
    return Model(lambda m, x: m.a(x) * m.a.weight.sum(1) + x @ m.a.weight, a=nn.Linear(16, 16))


MODELS = [tied, twice, also_summed]


@pytest.mark.parametrize("make", MODELS)
def test_shared_weights_are_quantised_and_saved(make, tmp_path) -> None:
    model, x = make(), torch.randn(4, 6, 16)
    served = compiled(model, x, strict=True)
    assert served.summary.precision == {"w8a8": 2}
    served.save_pretrained(tmp_path)
    assert_near(fxquant.load(tmp_path), model, x)


@pytest.mark.parametrize("make", MODELS)
def test_keep_float_works_for_them(make) -> None:
    model = make()
    served = compiled(model, torch.randn(4, 6, 16), FLOAT32.with_(keep_float=("a",)))
    assert served.summary.precision["float"] >= 1


def test_convolutions_called_twice_are_reconstructed_each() -> None:
    model = Model(lambda m, x: m.c(F.silu(m.c(x))), c=nn.Conv2d(8, 8, 3, padding=1))
    calls = [(torch.randn(4, 8, 6, 6),) for _ in range(4)]
    recipe = Recipe.parse("w4a8").with_(compute_dtype="float32")
    served = fxquant.compile(model.eval(), calls, recipe, progress=False, iters=4)
    assert [unit.path for unit in served.summary.units] == ["c", "c:2"]
    assert_near(served, model, calls[0][0], most=0.3)


def test_a_name_that_is_taken_is_not_bound_over() -> None:
    model = twice()
    model.a.register_parameter("weight_2", nn.Parameter(torch.full((16,), 3.0)))
    model.a.register_parameter("weight_scale", nn.Parameter(torch.full((16,), 5.0)))
    model._forward = lambda m, x: m.a(F.silu(m.a(x))) * m.a.weight_2 + m.a.weight_scale
    compiled(model, torch.randn(4, 6, 16))


def test_golden() -> None:
    model = Model(
        lambda m, x: torch.nn.functional.linear(torch.nn.functional.linear(x, m.w).relu(), m.w),
        w=parameter(16, 16),
    )
    gm = capture(model.eval(), (torch.randn(2, 6, 16),)).graph_module
    golden(
        __file__,
        run(
            (*pipelines.PREPARE, *pipelines.OBSERVE), gm, story().options, stop_after="own_weights"
        ),
    )
