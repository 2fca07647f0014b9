"""group_units gives blocks and lone layers their unit; units are convex."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.graph.nodes import note, write_note
from fxquant.graph.runner import clone
from fxquant.graph.stages import violations
from fxquant.recipe import Recipe
from tests.passes.small import Model, assert_near, compiled, parameter
from tests.toy import golden, story


def units(gm):
    return list(dict.fromkeys(tuple(note(n, "unit")) for n in gm.graph.nodes if note(n, "unit")))


def test_units_are_the_blocks_and_the_layers_outside_of_them():
    found = dict(units(story()["group_units"]))
    assert found["down_resnet"] == found["up_resnet"] == "ResnetBlock2D"
    assert found["transformer.transformer_blocks.0"] == "BasicTransformerBlock"
    assert found["downsample.conv"] == found["transformer.proj_in"] == "Conv2d"
    assert "transformer.transformer_blocks.0.attn1" not in found, "the block holds it"


def test_a_unit_that_is_left_and_entered_again_is_refused():
    gm = clone(story()["group_units"])
    assert not violations(gm, "grouped")
    inner = next(n for n in gm.graph.nodes if n.name == "group_norm_1")
    write_note(inner, unit=["elsewhere", "GroupNorm"])
    assert "down_resnet is not convex" in violations(gm, "grouped")[0]


def test_golden():
    golden(
        __file__,
        story()["group_units"],
        "down_resnet",
        "downsample",
        "transformer.proj_in",
        "up_resnet",
    )


def test_functional_layers_of_one_module_are_pieces_of_their_own() -> None:
    """Their unit is the module's, which is left between them."""
    model = Model(
        lambda m, x: F.linear(m.mid(F.silu(F.linear(x, m.first))), m.last),
        first=parameter(24, 16), mid=nn.Linear(24, 24), last=parameter(16, 24),
    )  # fmt: skip
    x = torch.randn(4, 6, 16)
    served = compiled(model, x, strict=True)
    assert served.summary.precision == {"w8a8": 3}
    for loss in ("fbr", "layer"):
        recipe = Recipe.parse("w4a8").with_(compute_dtype="float32", reconstruction={"loss": loss})
        trained = fxquant.compile(model, [(x,)] * 4, recipe, progress=False, iters=4)
        assert [unit.path for unit in trained.summary.units] == ["", "mid", ":2"]
        assert_near(trained, model, x, most=0.3)
