"""Errors by pass and by unit: a planted fault is found, and numbers agree with brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant.errors import PassError
from fxquant.evaluate.bisect import (
    activation_ranges,
    errors_after_passes,
    quantiser_units,
    unit_errors,
)
from fxquant.evaluate.metrics import relative_l2
from fxquant.graph.nodes import attribute, note, set_buffer
from fxquant.graph.runner import Record, clone
from tests.toy import story

FLOAT_UNITS = {"time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out"}


def passes(records: list[Record]):
    s = story()
    with torch.no_grad():
        truth = s.model(**s.signature.unflatten(s.calls[0]), return_dict=False)[0]
    return errors_after_passes(records, truth, s.calls[0], s.fake.table)


def units(gm=None):
    s = story()
    found = unit_errors(gm or s.fake.graph, s.calls[0], s.fake.table.row(0))
    return {u.path: u for u in found}


def scaled(gm, name: str, factor: float):
    """A clone with one tensor multiplied."""
    changed = clone(gm)
    set_buffer(changed, name, attribute(gm, name).detach() * factor)
    return changed


def test_only_fake_quantisation_makes_an_error():
    found = {p.name: p for p in passes(story().records)}
    assert list(found) == [r.name for r in story().records]
    assert found["capture"].error < 1e-6
    assert found["insert_observers"].error < 1e-5
    assert found["observers_to_fake_quant"].jump > 5e-3
    assert max(found.values(), key=lambda p: p.jump).name == "observers_to_fake_quant"


def test_jumps_add_up_to_the_last_error():
    found = passes(story().records)
    assert sum(p.jump for p in found) == pytest.approx(found[-1].error)


@pytest.mark.parametrize("culprit", ["fold_constants", "fuse_epilogues"])
def test_a_pass_that_breaks_the_graph_makes_the_biggest_jump(culprit):
    records = list(story().records)
    k = [r.name for r in records].index(culprit)
    records[k:] = [replace(r, graph=scaled(r.graph, "conv_out.weight", 1.5)) for r in records[k:]]
    assert max(passes(records), key=lambda p: p.jump).name == culprit


def test_a_result_that_is_not_finite_is_an_infinite_error():
    last = story().records[-1]
    broken = replace(last, graph=scaled(last.graph, "conv_out.bias", float("nan")))
    assert passes([story().records[0], broken])[-1].error == float("inf")


def test_a_graph_that_does_not_run_names_its_pass():
    first, second, *_ = story().records
    broken = clone(second.graph)
    set_buffer(broken, "conv_out.weight", torch.zeros(4, 3, 3, 3))
    with pytest.raises(PassError, match=rf"the graph that {second.name} left does not run"):
        passes([first, replace(second, graph=broken)])


def test_units_come_in_order_and_float_ones_have_no_error_of_their_own():
    found = units()
    assert list(found)[-1] == "conv_out"
    assert set(found) > FLOAT_UNITS
    for path, unit in found.items():
        assert (unit.isolated == 0) is (path in FLOAT_UNITS)
    assert found["conv_out"].cumulative == pytest.approx(passes(story().records)[-7].error, rel=0.2)


def test_the_first_quantised_unit_has_only_its_own_error():
    first = units()["down_resnet"]
    assert first.isolated == first.cumulative > 0


def test_isolated_errors_agree_with_switching_off_everything_else():
    s = story()
    path = "up_resnet"
    alone = clone(s.fake.graph)
    for node in list(alone.graph.nodes):
        if "fake_quantize" in str(node.target) and note(node, "unit")[0] != path:
            node.replace_all_uses_with(node.args[0])
            alone.graph.erase_node(node)
    alone.recompile()
    last = [n.name for n in alone.graph.nodes if (note(n, "unit") or [""])[0] == path][-1]
    value, truth = (output_of(g, last) for g in (alone, s["mark_timestep_only"]))
    assert units()[path].isolated == pytest.approx(relative_l2(value, truth), rel=1e-3)


def output_of(gm, name: str) -> torch.Tensor:
    """The value of a node when the graph runs on the story's first call."""
    cut = clone(gm)
    node = next(n for n in cut.graph.nodes if n.name == name)
    next(n for n in cut.graph.nodes if n.op == "output").args = (node,)
    cut.recompile()
    return story().run(cut)


def test_a_coarse_unit_is_the_worst_by_itself_and_spares_the_others():
    gm = scaled(story().fake.graph, "downsample.conv.weight_scale", 30.0)
    before, after = units(), units(gm)
    assert max(after.values(), key=lambda u: u.isolated).path == "downsample.conv"
    for path, unit in after.items():
        if path != "downsample.conv":
            assert unit.isolated == before[path].isolated
    assert after["conv_out"].cumulative > 2 * before["conv_out"].cumulative
    assert after["down_resnet"] == before["down_resnet"]


def test_activation_ranges_are_those_the_observers_saw():
    s = story()
    row = s.fake.table.row(0)
    ranges = torch.stack([activation_ranges(s.fake.graph, call, row) for call in s.calls])
    seen = s["insert_observers"]
    names = quantiser_units(s.fake.graph)
    assert ranges.shape == (len(s.calls), len(row), 2)
    for k, name in enumerate(names):
        low, high = attribute(seen, f"observers.{k}").rows[0].range()
        assert float(ranges[:, k, 0].min()) == pytest.approx(low, rel=1e-5), name
        assert float(ranges[:, k, 1].max()) == pytest.approx(high, rel=1e-5), name


def test_quantisers_are_named_by_their_units():
    names = quantiser_units(story().fake.graph)
    assert names[0] == "down_resnet"
    assert set(names) == set(units()) - FLOAT_UNITS
