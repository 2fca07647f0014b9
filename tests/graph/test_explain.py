"""Every node of a bound graph names its kernel, or says why it is no integer operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.fx import Node

from fxquant.errors import FallbackError
from fxquant.graph.explain import MOVES, SIMULATED, TAKEN, explain, fallbacks, refuse
from fxquant.graph.lowered import arguments, is_op
from fxquant.graph.nodes import is_layer, note, write_note
from fxquant.graph.options import Options
from fxquant.graph.runner import clone
from fxquant.kernels.machine import Machine
from fxquant.passes.lower.select_kernels import select_kernels
from fxquant.recipe import Recipe
from tests.toy import story

WIDE = Recipe.parse("w8a8-fast").with_(weight_bits=16)


def explained(machine: str = "x86-vnni", backend: str = "auto", recipe: Recipe | None = None):
    """Explanations of the toy by node name, bound to a machine."""
    options = Options(recipe or Recipe(), Machine.named(machine), backend)
    gm = select_kernels(clone(story(recipe)["set_compute_dtype"]), options=options)
    return {n.name: e for n, e in explain(gm, options).items()}


def test_every_node_has_a_kernel_or_a_reason():
    gm = story()["select_kernels"]
    for node, e in explain(gm, story().options).items():
        assert e.node == node.name
        if is_op(node):
            assert e.kernel == arguments(node)["kernel"]
            assert list(e.considered.values()).count(TAKEN) == 1
            assert e.considered[e.kernel] == TAKEN
            assert list(e.considered)[-1] == "reference"
            assert e.reason is None
        else:
            assert e.kernel is None
            assert not e.considered
            assert e.reason


def test_layers_give_the_reason_that_annotate_wrote():
    gm = story()["select_kernels"]
    told = {e.module: e.reason for n, e in explain(gm, story().options).items() if is_layer(n)}
    assert told["conv_in"] == "recipe keeps conv_in float"
    assert told["time_embedding.linear_1"] == "recipe keeps time_embedding.* float"


def test_what_is_left_of_aten_says_why():
    nodes = explained()
    cat = next(e for e in nodes.values() if e.op == "aten.cat" and e.module == "")
    assert cat.reason.startswith("a concatenation joins the quantize after it if nothing else")
    readers = next(n for n in story()["select_kernels"].graph.nodes if n.name == cat.node).users
    assert cat.reason.endswith("read by " + ", ".join(f"%{r.name}" for r in readers))
    assert nodes["sin"].reason == "depends on the timestep alone: one row for a whole batch"
    assert nodes["permute"].reason == "moves elements, computes nothing"
    assert nodes["permute"].precision == MOVES
    assert nodes["sample"].reason == "an input"


def test_an_operator_that_nothing_absorbs_is_named():
    gm = clone(story()["select_kernels"])
    sin = next(n for n in gm.graph.nodes if n.name == "sin")
    write_note(sin, timestep_only=None)
    assert explain(gm, story().options)[sin].reason == "no fxquant operator does aten.sin"


def test_precision():
    nodes = explained()
    assert {e.precision for e in nodes.values()} == {"w8a8", "to a8", "float32", MOVES}
    assert {e.op for e in nodes.values() if e.precision == "w8a8"} == {
        "fxquant.conv2d",
        "fxquant.linear",
    }


def test_another_machine_is_another_choice_with_another_reason():
    here, there = explained(), explained("arm64")
    name = next(n for n, e in here.items() if e.op == "fxquant.conv2d")
    assert here[name].considered["gemm"] == TAKEN
    assert "this is arm64" in there[name].considered["gemm"]
    assert there[name].kernel == "reference"
    assert here[name].considered["reference"] == "not needed: gemm comes before it"
    asked = explained(backend="reference")[name]
    assert "the reference backend was asked for" in asked.considered["gemm"]


def test_layers_of_more_than_8_bits_are_simulated_and_a_fallback():
    nodes = explained(recipe=WIDE)
    simulated = [e for e in nodes.values() if e.precision == "w16a8 simulated"]
    assert simulated
    assert {e.reason for e in simulated} == {SIMULATED}
    slow = fallbacks(story(WIDE)["select_kernels"], story(WIDE).options)
    assert slow == {e.node: SIMULATED for e in simulated}


def test_only_unplanned_float_layers_are_fallbacks():
    gm = clone(story()["select_kernels"])
    assert not fallbacks(gm, story().options)
    layer: Node = next(n for n in gm.graph.nodes if is_layer(n))
    assert "float" in note(layer, "quant")
    write_note(layer, quant={"float": "grouped convolutions ...", "unplanned": True})
    reference = replace(story().options, backend="reference")
    assert fallbacks(gm, reference) == {layer.name: "stays float: grouped convolutions ..."}


def test_a_refusal_lists_every_node_and_says_what_to_do():
    options = replace(story().options, machine=Machine.named("x86-vnni-no-compiler"))
    gm = select_kernels(clone(story()["set_compute_dtype"]), options=options)
    slow = fallbacks(gm, options)
    assert slow
    with pytest.raises(FallbackError) as caught:
        refuse(slow)
    first, *rest = str(caught.value).splitlines()
    assert f"{len(slow)} operators would not run as planned" in first
    assert "Install a C++ compiler, or point $CXX at one." in first
    listed = [name for line in rest for name in line.split(":")[0].strip().split(", ")]
    assert sorted(listed) == sorted(slow)
    assert len(rest) == len(set(slow.values())), "a reason is given once"
    refuse({})


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        (SIMULATED, "at most 8 bits"),
        ("stays float: its weight is computed", "keep_float"),
        ("not onednn: the CPU has no VNNI", "backend='reference'"),
    ],
)
def test_each_kind_of_fallback_has_its_remedy(reason, remedy):
    with pytest.raises(FallbackError, match=remedy):
        refuse({"conv2d": reason})
