"""Every invariant of the stage table fires on a graph that breaks it, and on no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from fxquant.graph import stages
from fxquant.graph.edges import Edge
from fxquant.graph.nodes import aten, calls, is_layer, note, write_note
from fxquant.graph.runner import Step, clone
from fxquant.graph.stages import OBSERVERS, STAGES, quantiser_of, violations
from fxquant.passes import pipelines
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from tests.toy import story


def annotated_layer(gm: GraphModule) -> Node:
    return next(n for n in gm.graph.nodes if is_layer(n) and "input" in (note(n, "quant") or {}))


def observer(gm: GraphModule) -> Node:
    return next(n for n in gm.graph.nodes if str(n.target).startswith(f"{OBSERVERS}."))


def bypass(node: Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def drop_a_value(gm: GraphModule) -> None:
    del next(calls(gm, aten.silu.default)).meta["val"]


def insert_a_dropout(gm: GraphModule) -> None:
    node = next(calls(gm, aten.silu.default))
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.dropout.default, (node, 0.0, False))
    new.meta = dict(node.meta)


def forget_a_decision(gm: GraphModule) -> None:
    write_note(annotated_layer(gm), quant=None)


def decide_half(gm: GraphModule) -> None:
    layer = annotated_layer(gm)
    write_note(layer, quant={"input": note(layer, "quant")["input"]})


def put_a_spec_on_a_norm(gm: GraphModule) -> None:
    norm = next(calls(gm, aten.group_norm.default))
    write_note(norm, quant=note(annotated_layer(gm), "quant"))


def leave_a_gap(gm: GraphModule) -> None:
    layer = annotated_layer(gm)
    quant = note(layer, "quant")
    write_note(layer, quant={**quant, "input": {**quant["input"], "index": 99}})


def remove_an_observer(gm: GraphModule) -> None:
    bypass(observer(gm))


def put_an_observer_back(gm: GraphModule) -> None:
    silu = next(calls(gm, aten.silu.default))
    gm.add_submodule(f"{OBSERVERS}.0", torch.nn.Identity())
    with gm.graph.inserting_after(silu):
        new = gm.graph.call_module(f"{OBSERVERS}.0", (silu,))
    new.meta = dict(silu.meta)


def remove_an_activation_quantiser(gm: GraphModule) -> None:
    bypass(next(calls(gm, fake_quantize)))


def remove_a_weight_quantiser(gm: GraphModule) -> None:
    bypass(next(calls(gm, fake_quantize_weight)))


def split_a_unit(gm: GraphModule) -> None:
    """A norm in the middle of a residual block says that it belongs to another block."""
    norms = [n for n in calls(gm, aten.group_norm.default) if (note(n, "unit") or [""])[0]]
    write_note(norms[1], unit=["elsewhere", "ResnetBlock2D"])


BREAKS: list[tuple[str, str, Callable[[GraphModule], None], str]] = [
    ("fold_constants", "captured", drop_a_value, "%silu has no example value"),
    ("mark_timestep_only", "prepared", drop_a_value, "%silu has no example value"),
    ("mark_timestep_only", "prepared", insert_a_dropout, "%dropout_default should have been"),
    ("annotate", "annotated", forget_a_decision, "neither a spec nor a reason to stay float"),
    ("annotate", "annotated", decide_half, "neither a spec nor a reason to stay float"),
    ("annotate", "annotated", put_a_spec_on_a_norm, "%group_norm carries a spec but is no layer"),
    ("annotate", "annotated", leave_a_gap, "quantiser indices have gaps: [1, 2, "),
    (
        "insert_observers",
        "observed",
        remove_an_observer,
        "is annotated but reads an input from no observer",
    ),
    ("insert_observers", "observed", leave_a_gap, "quantiser indices have gaps"),
    ("observers_to_fake_quant", "fake_quantized", put_an_observer_back, "is still an observer"),
    (
        "observers_to_fake_quant",
        "fake_quantized",
        remove_an_activation_quantiser,
        "reads an input that is not fake-quantised",
    ),
    (
        "group_units",
        "grouped",
        remove_a_weight_quantiser,
        "reads a weight that is not fake-quantised",
    ),
    ("group_units", "grouped", split_a_unit, "unit down_resnet is not convex"),
    ("select_kernels", "lowered", drop_a_value, "%silu has no example value"),
]


@pytest.mark.parametrize(
    ("last", "stage", "damage", "sentence"),
    BREAKS,
    ids=[f"{stage}-{damage.__name__}" for _, stage, damage, _ in BREAKS],
)
def test_a_graph_that_breaks_it_is_noticed(
    last: str, stage: str, damage: Callable[[GraphModule], None], sentence: str
) -> None:
    gm = clone(story()[last])
    assert violations(gm, stage) == []
    damage(gm)
    found = violations(gm, stage)
    assert any(sentence in problem for problem in found), found


def test_the_graphs_above_break_every_check_of_the_table() -> None:
    fired = set()
    for last, stage, damage, _ in BREAKS:
        gm = clone(story()[last])
        damage(gm)
        fired |= {check for check in STAGES[stage] if list(check(gm))}
    assert fired == {check for checks in STAGES.values() for check in checks}


@pytest.mark.parametrize("step", pipelines.ALL, ids=lambda step: step.name)
def test_the_result_of_every_pass_satisfies_its_stage(step: Step) -> None:
    assert violations(story()[step.name], step.stage) == []


def test_two_units_in_a_row_are_convex_and_a_sandwich_is_not() -> None:
    def unit_chain(*units: str | None) -> GraphModule:
        graph = torch.fx.Graph()
        node = graph.placeholder("x")
        for unit in units:
            node = graph.call_function(aten.silu.default, (node,))
            write_note(node, unit=[unit, "Linear"] if unit else None)
        graph.output(node)
        return GraphModule({}, graph)

    for convex in (("a", "a", "b"), ("a", "b", "c"), (None, "a", None)):
        assert list(stages.units_are_convex(unit_chain(*convex))) == []
    for sandwich in (("a", "b", "a"), ("a", None, "a"), ("a", "b", "c", "b")):
        assert list(stages.units_are_convex(unit_chain(*sandwich)))


def test_the_quantiser_of_a_layer_is_found_through_layout_operators() -> None:
    gm = story()["group_units"]
    layer = next(n for n in gm.graph.nodes if n.name == "linear_6")  # to_out, behind a reshape
    found = quantiser_of(Edge(layer, "input"), lambda n: n.target is fake_quantize)
    assert layer.args[0].target is not fake_quantize
    assert found is not None
    assert found.name == "fq_6"
    assert quantiser_of(Edge(layer, "input"), lambda n: False) is None
