"""Whole pipelines on the toy UNet, and the mutation test of the golden helper."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.graph import runner
from fxquant.graph.dump import dump
from fxquant.graph.explain import fallbacks
from fxquant.graph.options import Options
from fxquant.graph.runner import clone
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests.golden import assert_golden
from tests.toy import story

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize(
    ("name", "last"), [("prepared", "mark_timestep_only"), ("fake_quantized", "group_units")]
)
def test_stages(name, last):
    assert_golden(dump(story()[last]), GOLDENS / f"toy_{name}.txt")


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
def test_lowered(recipe):
    gm = story(Recipe.parse(recipe))["select_kernels"]
    assert_golden(dump(gm), GOLDENS / f"toy_lowered_{recipe}.txt")


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
def test_lowered_for_a_gpu(recipe):
    """Without a GPU: kernels are chosen for a machine, not for this one."""
    parsed = Recipe.parse(recipe)
    gpu = Options(parsed, Machine.named("cuda-sm90"), device="cuda")
    lowered = story(parsed)["fuse_requantize"]
    gm = runner.run(pipelines.BIND, lowered, gpu)
    assert_golden(dump(gm), GOLDENS / f"toy_lowered_{recipe}_cuda.txt")
    assert not fallbacks(gm, gpu)


def test_dump_is_the_same_for_a_clone():
    gm = story()["select_kernels"]
    assert dump(clone(gm)) == dump(gm)


def swap_edge(gm):
    node = next(n for n in gm.graph.nodes if n.name == "add_6")
    a, b = node.args[0], node.args[-5]
    node.args = tuple(b if x is a else a if x is b else x for x in node.args)


def add_node(gm):
    node = next(n for n in gm.graph.nodes if n.name == "conv2d_10")
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(node.target, node.args)
    new.meta = dict(node.meta)


def change_spec(gm):
    from fxquant.graph.nodes import note, write_note

    node = next(n for n in gm.graph.nodes if n.name == "add_6")
    quant = note(node, "quant")
    write_note(node, quant={**quant, "input": {**quant["input"], "symmetric": True}})


@pytest.mark.parametrize("mutate", [swap_edge, add_node, change_spec])
def test_the_golden_helper_notices_a_mutation(mutate, monkeypatch):
    monkeypatch.delenv("FXQUANT_ACCEPT", raising=False)
    gm = clone(story()["select_kernels"])
    path = GOLDENS / "toy_lowered_w8a8-fast.txt"
    assert_golden(dump(gm), path)
    mutate(gm)
    with pytest.raises(AssertionError, match="differs"):
        assert_golden(dump(gm), path)


def test_accept_writes_the_file(tmp_path, monkeypatch):
    path = tmp_path / "goldens" / "x.txt"
    monkeypatch.delenv("FXQUANT_ACCEPT", raising=False)
    with pytest.raises(AssertionError, match="no golden"):
        assert_golden("a\n", path)
    monkeypatch.setenv("FXQUANT_ACCEPT", "1")
    assert_golden("a\n", path)
    monkeypatch.delenv("FXQUANT_ACCEPT")
    assert_golden("a\n", path)
    with pytest.raises(AssertionError, match="differs"):
        assert_golden("b\n", path)
