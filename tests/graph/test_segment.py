"""Parts of a graph compute what the whole computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxquant.graph.interpret import Watched
from fxquant.graph.nodes import is_symbolic
from fxquant.graph.segment import before, inputs_of, segment
from fxquant.graph.specialise import specialise
from tests.toy import Story, story


def values(toy: Story, gm: torch.fx.GraphModule) -> dict[str, Any]:
    """Every node's value on the first call."""
    found: dict[str, Any] = {}

    def see(node: Node, value: Any, env: dict[Node, Any]) -> None:
        found[node.name] = value

    with torch.no_grad():
        Watched(gm, see).run(*toy.calls[0], toy.fake.table.row(0))
    return found


def test_a_segment_from_the_inputs_is_the_graph_up_to_there() -> None:
    toy = story()
    gm = toy.fake.graph
    whole = values(toy, gm)
    wanted = [n.name for n in gm.graph.nodes if str(n.target) == "aten.conv2d.default"][:3]
    with torch.no_grad():
        got = segment(gm, wanted)(*toy.calls[0], toy.fake.table.row(0))
    for name, value in zip(wanted, got, strict=True):
        assert torch.equal(value, whole[name])


def test_a_segment_starts_at_what_is_known() -> None:
    toy = story()
    gm = toy.fake.graph
    whole = values(toy, gm)
    convolutions = [n.name for n in gm.graph.nodes if str(n.target) == "aten.conv2d.default"]
    known, wanted = convolutions[0], convolutions[1]
    part = segment(gm, [wanted], [known])
    assert known not in {n.name for n in part.graph.nodes}, "what is known is computed again"
    other_value = whole[known].flip(-1)
    with torch.no_grad():
        same = part(*toy.calls[0], toy.fake.table.row(0), whole[known])[0]
        other = part(*toy.calls[0], toy.fake.table.row(0), other_value)[0]
    assert torch.equal(same, whole[wanted])
    assert not torch.equal(other, whole[wanted])


def test_before_stops_at_the_ends() -> None:
    gm = story().fake.graph
    nodes = list(gm.graph.nodes)
    last = nodes[-2]
    everything = before([last])
    assert set(inputs_of(gm)) <= everything
    assert before([last], stop=[last]) == set()
    direct = before([last], stop=last.all_input_nodes)
    assert direct == {last}


def test_a_specialised_graph_asks_no_intermediate_value_for_its_size() -> None:
    toy = story()
    gm = specialise(toy.fake.graph, toy.calls[0])
    asking = [
        n
        for n in gm.graph.nodes
        if str(n.target).startswith("aten.sym_size") and n.args[0] not in inputs_of(gm)
    ]
    assert not asking
    before_count = sum(is_symbolic(n) for n in toy.fake.graph.graph.nodes)
    assert before_count > 0, "the toy has no size computations to replace"


def test_a_specialised_graph_computes_the_same_at_any_batch() -> None:
    toy = story()
    gm = specialise(toy.fake.graph, toy.calls[0])
    row = toy.fake.table.row(0)
    for rows in (1, 2, 5):
        call = [t[:1].expand(rows, *t.shape[1:]).contiguous() for t in toy.calls[0]]
        with torch.no_grad():
            assert torch.equal(gm(*call, row), toy.fake.graph(*call, row))
