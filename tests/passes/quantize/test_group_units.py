"""group_units gives blocks and lone layers their unit; units are convex."""

from __future__ import annotations

from fxquant.graph.nodes import note, write_note
from fxquant.graph.runner import clone
from fxquant.graph.stages import violations
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
