"""attention="int8": q, k and v get quantisers, and both products run on integers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant import Recipe
from fxquant.errors import ArtifactError, RecipeError
from fxquant.graph.edges import quantised_edges
from fxquant.graph.lowered import arguments, ops
from fxquant.graph.nodes import is_attention, note
from fxquant.quant.fake_quant import fake_quantize
from fxquant.runtime.document import Blueprint
from fxquant.runtime.fields import Field
from fxquant.runtime.upgrade import upgraded
from tests import models
from tests.runtime import compiled as c
from tests.runtime import saved
from tests.toy import relative_error, story

INT8 = Recipe.parse("w8a8-fast").with_(attention="int8")


def compiled() -> fxquant.QuantizedModel:
    recipe = c.float32(attention="int8")
    return c.compiled(c.float_toy(), models.calls("toy", 5, batch=16), recipe)


def attention(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if n.target is ops.attention.default]


def test_every_operand_has_a_quantiser_of_eight_bits() -> None:
    for recipe in (INT8, Recipe.parse("w4a4-fast").with_(attention="int8")):
        found = [n for n in story(recipe)["annotate"].graph.nodes if is_attention(n)]
        assert len(found) == 2
        for node in found:
            edges = quantised_edges(node)
            assert [edge.name for edge in edges] == ["q", "k", "v"]
            assert {edge.spec["bits"] for edge in edges if edge.spec} == {8}
    assert not any(note(n, "quant") for n in story()["annotate"].graph.nodes if is_attention(n))


def test_quantisers_sit_behind_the_projections_and_belong_to_the_unit() -> None:
    gm = story(INT8)["group_units"]
    node = next(n for n in gm.graph.nodes if is_attention(n))
    indices = [edge.spec["index"] for edge in quantised_edges(node) if edge.spec]
    quantisers = {
        n.args[2]: n for n in gm.graph.nodes if n.target is fake_quantize and n.args[2] in indices
    }
    assert [str(quantisers[i].args[0].target) for i in indices] == ["aten.linear.default"] * 3
    assert all(note(n, "unit") == note(node, "unit") for n in quantisers.values())


def test_projections_write_the_integers_that_attention_reads() -> None:
    story_ = story(INT8)
    gm = story_["fuse_requantize"]
    for node in attention(gm):
        given = arguments(node)
        assert {given[name].meta["val"].dtype for name in "qkv"} == {torch.uint8}
        assert min(given[f"{name}_index"] for name in "qkv") >= 0
        assert node.meta["val"].dtype == torch.uint8
    assert all(arguments(n)["kernel"] == "fused" for n in attention(story_["select_kernels"]))
    assert relative_error(story_.run(gm), story_.run(story_["group_units"])) < 0.03


def test_it_costs_little_here() -> None:
    exact = story().run(story()["capture"])
    errors = [relative_error(s.run(s["group_units"]), exact) for s in (story(), story(INT8))]
    assert errors[1] < 1.5 * errors[0]


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = compiled()
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert loaded.recipe.attention == "int8"
    assert any(name.endswith("on integers") for name in loaded.summary.kernels)
    saved.check_same_results(model, loaded, c.mixed_call(3))


def test_keep_float_names_attention_too() -> None:
    recipe = INT8.with_(keep_float=(*INT8.keep_float, "*.attn1"))
    found = [n for n in story(recipe)["annotate"].graph.nodes if is_attention(n)]
    assert [bool(quantised_edges(n)) for n in found] == [False, True]


def test_a_word_that_is_no_precision_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown attention 'int4'"):
        Recipe(attention="int4")


def test_attention_of_format_1_is_float_attention() -> None:
    node = {"name": "a", "op": "fxquant.attention.default"}
    old = {"nodes": [node | {"args": [{"node": "q"}, 1, 2, None, 0.5, "reference"]}, {"op": "x"}]}
    new = upgraded(Field(json.loads(json.dumps(old)), "graph.json"), 1).value
    args = new["nodes"][0]["args"]
    assert args[:3] == [{"node": "q"}, 1, 2]
    assert args[3:7] == [{"node": "row"}, -1, -1, -1]
    assert args[7:] == [None, 0.5, -1, 8, {"dtype": "float32"}, "reference"]
    assert new["nodes"][1] == old["nodes"][1]
    assert upgraded(Field(new, "graph.json"), 3).value == new
    assert upgraded(Field([], "graph.json"), 1).value == []
    for damaged in (3, [7, node, node | {"args": [1]}]):
        assert upgraded(Field({"nodes": damaged}, "graph.json"), 1).value["nodes"] == damaged


def test_integers_need_all_three_quantisers(tmp_path: Path) -> None:
    compiled().save_pretrained(tmp_path)
    document = json.loads(next(tmp_path.glob("graph-*.json")).read_text())
    Blueprint(Field(document, "graph.json"))
    node = next(n for n in document["nodes"] if n["op"] == "fxquant.attention.default")
    node["args"][5] = -1
    with pytest.raises(ArtifactError, match="mixes floats and integers"):
        Blueprint(Field(document, "graph.json"))
