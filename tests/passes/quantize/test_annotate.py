"""annotate decides for every layer and inserts nothing."""

from __future__ import annotations

import pytest

from fxquant.graph.nodes import is_layer, module_path, note
from fxquant.recipe import Recipe
from tests.toy import golden, story


def decisions(recipe=None):
    return {
        module_path(n): note(n, "quant")
        for n in story(recipe)["annotate"].graph.nodes
        if is_layer(n)
    }


def test_nothing_is_inserted():
    assert len(story()["annotate"].graph.nodes) == len(story().before("annotate").graph.nodes)


def test_first_last_and_time_layers_stay_float_with_a_reason():
    kept = {path for path, quant in decisions().items() if "float" in quant}
    assert kept == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert "conv_in" in decisions()["conv_in"]["float"]


def test_query_key_value_share_a_quantiser_and_blocks_do_not():
    index = {
        path: quant["input"]["index"] for path, quant in decisions().items() if "input" in quant
    }
    block = "transformer.transformer_blocks.0"
    assert (
        index[f"{block}.attn1.to_q"] == index[f"{block}.attn1.to_k"] == index[f"{block}.attn1.to_v"]
    )
    assert (
        index[f"{block}.attn2.to_k"] == index[f"{block}.attn2.to_v"] != index[f"{block}.attn2.to_q"]
    )
    assert index["up_resnet.conv1"] != index["up_resnet.conv_shortcut"]
    assert sorted(set(index.values())) == list(range(len(set(index.values()))))


@pytest.mark.parametrize(
    ("name", "bits"), [("w8a8-fast", (8, 8)), ("w4a8-fast", (4, 8)), ("w4a4-fast", (4, 4))]
)
def test_bits_follow_the_recipe(name, bits):
    quant = decisions(Recipe.parse(name))["down_resnet.conv1"]
    assert (quant["weight"]["bits"], quant["input"]["bits"]) == bits
    assert quant["weight"]["symmetric"]
    assert quant["weight"]["channel_axis"] == 0


def test_patterns_keep_layers_float():
    recipe = Recipe().with_(effort="fast", keep_float=("conv_in", "transformer.*"))
    kept = {path for path, quant in decisions(recipe).items() if "float" in quant}
    assert "transformer.proj_in" in kept
    assert "conv_out" not in kept


def test_golden():
    golden(
        __file__,
        story()["annotate"],
        "conv_in",
        "down_resnet",
        "downsample",
        "transformer.transformer_blocks.0.attn",
    )
