"""The pass runner: what passes are given, what stops them, what is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.errors import CaptureError, InvariantError, PassError
from fxquant.graph.capture import capture
from fxquant.graph.dump import dump
from fxquant.graph.nodes import aten, calls, get_attr, note, set_buffer, write_note
from fxquant.graph.options import Options
from fxquant.graph.runner import Pass, Record, Step, changed, clone, run
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines

X = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)
OPTIONS = Options(machine=Machine.named("x86-vnni"))


@pytest.fixture(scope="module")
def gm() -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Dropout(), nn.BatchNorm2d(4))
    return capture(model.eval(), (X,)).graph_module


def silu(gm: GraphModule) -> Node:
    return next(calls(gm, aten.silu.default))


def silu_to_relu(gm: GraphModule, *, options: Options) -> GraphModule:
    silu(gm).target = aten.relu.default
    return gm


def nothing(gm: GraphModule, *, options: Options) -> GraphModule:
    return gm


def bind_weight(gm: GraphModule, *, options: Options) -> GraphModule:
    set_buffer(gm, "0.weight", torch.zeros(4, 4, 3, 3))
    return gm


def write_a_note(gm: GraphModule, *, options: Options) -> GraphModule:
    write_note(silu(gm), timestep_only=True)
    return gm


def pipeline(*rewrites: Pass, stage: str = "captured") -> tuple[Step, ...]:
    return tuple(Step(rewrite, stage, "a reason") for rewrite in rewrites)


def test_a_rewrite_does_not_reach_the_graph_it_started_from(gm: GraphModule) -> None:
    before = dump(gm)
    after = run(pipeline(silu_to_relu), gm, OPTIONS)
    assert dump(gm) == before
    assert "relu" in dump(after)
    assert not torch.equal(after(X), gm(X))


def test_notes_do_not_reach_the_graph_it_started_from(gm: GraphModule) -> None:
    after = run(pipeline(write_a_note), gm, OPTIONS)
    assert note(silu(after), "timestep_only")
    assert note(silu(gm), "timestep_only") is None


def test_a_bound_tensor_does_not_reach_the_graph_it_started_from(gm: GraphModule) -> None:
    expected = gm(X)
    after = run(pipeline(bind_weight), gm, OPTIONS)
    assert not torch.equal(after(X), expected)
    assert torch.equal(gm(X), expected)


def test_a_clone_shares_weights_and_buffers(gm: GraphModule) -> None:
    copy = clone(gm)
    shared = dict((*copy.named_parameters(), *copy.named_buffers()))
    assert {"0.weight", "3.running_mean"} <= set(shared)
    assert all(shared[k] is v for k, v in (*gm.named_parameters(), *gm.named_buffers()))


def test_new_metadata_of_a_clone_is_its_own(gm: GraphModule) -> None:
    copy = clone(gm)
    silu(copy).meta["anything"] = 1
    assert "anything" not in silu(gm).meta


def test_passes_run_in_order_each_on_the_result_of_the_last(gm: GraphModule) -> None:
    def relu_to_gelu(gm: GraphModule, *, options: Options) -> GraphModule:
        next(calls(gm, aten.relu.default)).target = aten.gelu.default
        return gm

    after = run(pipeline(silu_to_relu, relu_to_gelu), gm, OPTIONS)
    assert "gelu" in dump(after)
    with pytest.raises(PassError, match="relu_to_gelu failed: StopIteration"):
        run(pipeline(relu_to_gelu, silu_to_relu), gm, OPTIONS)


def test_what_nothing_reads_is_removed(gm: GraphModule) -> None:
    def leave_rubbish(gm: GraphModule, *, options: Options) -> GraphModule:
        node = silu(gm)
        with gm.graph.inserting_after(node):
            gm.graph.call_function(aten.relu.default, (node,))
        return gm

    assert "relu" not in dump(run(pipeline(leave_rubbish), gm, OPTIONS))


def test_skipped_passes_do_not_run(gm: GraphModule) -> None:
    seen: list[Record] = []
    after = run(
        pipeline(silu_to_relu, nothing), gm, OPTIONS, skip=["silu_to_relu"], on_pass=seen.append
    )
    assert [r.name for r in seen] == ["nothing"]
    assert dump(after) == dump(gm)


def test_names_to_skip_may_come_from_a_generator(gm: GraphModule) -> None:
    names = (name for name in ["silu_to_relu"])
    assert dump(run(pipeline(silu_to_relu, nothing), gm, OPTIONS, skip=names)) == dump(gm)


def test_stop_after_runs_that_pass_and_no_later_one(gm: GraphModule) -> None:
    seen: list[Record] = []
    steps = pipeline(nothing, silu_to_relu, bind_weight)
    run(steps, gm, OPTIONS, stop_after="silu_to_relu", on_pass=seen.append)
    assert [r.name for r in seen] == ["nothing", "silu_to_relu"]


@pytest.mark.parametrize("wrong", [{"skip": ["strip_noop"]}, {"stop_after": "strip_noop"}])
def test_an_unknown_name_gets_a_near_one_and_the_list(gm: GraphModule, wrong: Any) -> None:
    with pytest.raises(PassError) as caught:
        run(pipelines.PREPARE, gm, OPTIONS, **wrong)
    message = str(caught.value)
    assert "no pass is called 'strip_noop'. Did you mean 'strip_noops'?" in message
    assert all(step.name in message for step in pipelines.PREPARE)


def broken(gm: GraphModule, *, options: Options) -> GraphModule:
    raise KeyError("conv7")


def test_a_pass_that_raises_is_named_and_its_error_chained(gm: GraphModule) -> None:
    with pytest.raises(PassError, match="pass broken failed: KeyError: 'conv7'") as caught:
        run(pipeline(nothing, broken), gm, OPTIONS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_internal_error_names_node_and_line_and_no_remedy_that_does_not_exist(gm) -> None:
    def busy(gm: GraphModule, *, options: Options) -> GraphModule:
        node = silu(gm)
        node.meta["stack_trace"] = 'File "unet.py", line 7, in forward\n    y = silu(x)'
        raise KeyError("conv7")

    busy.__globals__["__name__"] = "fxquant.passes.busy"
    try:
        with pytest.raises(PassError) as caught:
            run(pipeline(busy), gm, OPTIONS)
    finally:
        busy.__globals__["__name__"] = __name__
    message = str(caught.value)
    assert "unet.py:7: y = silu(x)" in message
    assert "%silu" in message
    assert "error in fxquant, not in the model" in message
    assert "fxquant dump" in message
    assert "skip" not in message


def test_errors_meant_for_the_user_pass_through_as_they_are(gm: GraphModule) -> None:
    def refuse(gm: GraphModule, *, options: Options) -> GraphModule:
        raise CaptureError("in plain words")

    with pytest.raises(CaptureError, match=r"^in plain words$"):
        run(pipeline(refuse), gm, OPTIONS)


def test_a_malformed_graph_is_the_fault_of_the_pass(gm: GraphModule) -> None:
    def use_before_definition(gm: GraphModule, *, options: Options) -> GraphModule:
        first, second = list(calls(gm, aten.conv2d.default, aten.silu.default))
        first.args = (second, *first.args[1:])
        return gm

    with pytest.raises(PassError, match="use_before_definition failed: RuntimeError"):
        run(pipeline(use_before_definition), gm, OPTIONS)


def test_a_broken_invariant_names_pass_stage_and_node(gm: GraphModule) -> None:
    def forget_the_value(gm: GraphModule, *, options: Options) -> GraphModule:
        node = silu(gm)
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(aten.relu.default, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return gm

    with pytest.raises(InvariantError) as caught:
        run(pipeline(nothing, forget_the_value), gm, OPTIONS)
    message = str(caught.value)
    assert message.startswith("pass forget_the_value left a graph that stage 'captured' forbids")
    assert "%relu_default has no example value" in message


def test_the_stage_that_counts_is_that_of_the_step(gm: GraphModule) -> None:
    run(pipeline(nothing, stage="captured"), gm, OPTIONS)
    with pytest.raises(InvariantError, match=r"stage 'prepared'[^%]*%dropout should have been"):
        run(pipeline(nothing, stage="prepared"), gm, OPTIONS)


def test_passes_are_given_the_options(gm: GraphModule) -> None:
    seen = []

    def look(gm: GraphModule, *, options: Options) -> GraphModule:
        seen.append(options)
        return gm

    run(pipeline(look), gm, OPTIONS)
    assert seen == [OPTIONS]


def test_a_record_counts_nodes_before_and_after(gm: GraphModule) -> None:
    def drop_dropout(gm: GraphModule, *, options: Options) -> GraphModule:
        node = next(calls(gm, aten.dropout.default))
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        gm.graph.erase_node(node)
        return gm

    seen: list[Record] = []
    clean = run(pipeline(nothing), gm, OPTIONS)
    after = run(pipeline(nothing, drop_dropout), clean, OPTIONS, on_pass=seen.append)
    count = len(clean.graph.nodes)
    assert [(r.name, r.nodes) for r in seen] == [
        ("nothing", (count, count)),
        ("drop_dropout", (count, count - 1)),
    ]
    assert all(r.seconds >= 0 for r in seen)
    assert seen[-1].graph is after


def test_changed_is_what_the_dump_shows(gm: GraphModule) -> None:
    assert not changed(gm, run(pipeline(nothing), gm, OPTIONS))
    assert changed(gm, run(pipeline(silu_to_relu), gm, OPTIONS))
    assert changed(gm, run(pipeline(write_a_note), gm, OPTIONS))


def test_an_empty_pipeline_changes_nothing(gm: GraphModule) -> None:
    assert run((), gm, OPTIONS) is gm


def test_inserted_attributes_survive_the_clean_up(gm: GraphModule) -> None:
    def scale(gm: GraphModule, *, options: Options) -> GraphModule:
        node = silu(gm)
        set_buffer(gm, "deep.inside.factor", torch.tensor(2.0))
        with gm.graph.inserting_before(node):
            factor = get_attr(gm, "deep.inside.factor", like=node)
        node.target, node.args = aten.mul.Tensor, (node.args[0], factor)
        return gm

    after = run(pipeline(scale, nothing), gm, OPTIONS)
    assert after.get_buffer("deep.inside.factor") == 2
    assert "deep.inside.factor" in dump(after)
