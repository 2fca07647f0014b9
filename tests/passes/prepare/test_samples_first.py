"""torch's own attention multiplies with the samples outermost, and can be reconstructed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.nodes import LINEAR, calls, counts_samples, shape
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests.passes.small import Model, assert_near, compiled, parameter, prepared
from tests.toy import golden, story


def attention(**options: bool) -> Model:
    attend = nn.MultiheadAttention(16, 4, batch_first=True)
    return Model(lambda m, x: m.out(m.a(x, x, x, **options)[0]), a=attend, out=nn.Linear(16, 16))


@pytest.mark.parametrize("weights", [True, False])
def test_every_product_has_samples_first(weights: bool) -> None:
    gm = prepared(attention(need_weights=weights), torch.randn(3, 6, 16))
    for layer in calls(gm, LINEAR):
        assert counts_samples(gm, shape(layer)[0])
        assert len(shape(layer)) == 3


def test_encoder_layers_run_in_integers() -> None:
    model = Model(lambda m, x: m.a(x), a=nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    served = compiled(model, torch.randn(4, 6, 16), strict=True)
    assert served.summary.precision == {"w8a8": 4}


def test_they_are_reconstructed() -> None:
    recipe = Recipe.parse("w4a8").with_(compute_dtype="float32")
    model, x = attention(need_weights=False), torch.randn(4, 6, 16)
    calls_ = [(torch.randn_like(x),) for _ in range(4)]
    served = fxquant.compile(model.eval(), calls_, recipe, progress=False, iters=4)
    assert {unit.path for unit in served.summary.units} == {"a", "out"}
    assert_near(served, model, x, most=0.3)


def test_golden() -> None:
    model = Model(
        lambda m, x: torch.nn.functional.linear(x.transpose(0, 1), m.w), w=parameter(24, 16)
    )
    gm = capture(model.eval(), (torch.randn(2, 6, 16),)).graph_module
    golden(__file__, run(pipelines.PREPARE, gm, story().options, stop_after="samples_first"))
