"""Units cut out of the fake-quant graph compute what they compute inside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.interpret import Watched
from fxquant.graph.nodes import is_layer
from fxquant.graph.specialise import specialise
from fxquant.quant.fake_quant import fake_quantize
from fxquant.reconstruction.reconstruct import bypassed
from fxquant.reconstruction.subgraph import extract, units
from tests.toy import story


def graph() -> GraphModule:
    toy = story()
    return specialise(toy.fake.graph, toy.calls[0])


def values(gm: GraphModule) -> dict[str, Any]:
    toy, found = story(), {}

    def see(node: Node, value: Any, env: dict[Node, Any]) -> None:
        found[node.name] = value

    rows = toy.fake.table.rows(torch.zeros(2))
    with torch.no_grad():
        Watched(gm, see).run(*toy.calls[0], rows)
    return found


def test_units_cover_every_quantised_layer_once_in_execution_order() -> None:
    gm = graph()
    found = units(gm)
    weights = [w for unit in found for w in unit.weights]
    layers = [n for n in gm.graph.nodes if is_layer(n) and n.args[1] in weights]
    assert len(weights) == len(set(weights)) == len(layers) > 5
    position = {n: k for k, n in enumerate(gm.graph.nodes)}
    ends = [position[unit.nodes[-1]] for unit in found]
    assert ends == sorted(ends)
    quantisers = [q for unit in found for q in unit.quantisers]
    assert sorted(quantisers) == list(range(story().fake.table.values.shape[1]))
    kinds = {unit.kind for unit in found}
    assert {"ResnetBlock2D", "BasicTransformerBlock", "Conv2d"} <= kinds


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_unit_computes_what_the_graph_does(by_layer: bool, quantised: bool) -> None:
    gm = graph()
    inside = values(gm if quantised else bypassed(gm))
    rows = story().fake.table.rows(torch.zeros(2))
    everything = values(gm)
    for unit in units(gm, by_layer):
        part = extract(gm, unit, fake_quantize if quantised else None)
        given = [inside[n.name] for n in unit.inputs]
        weights = [
            everything[n.name] if quantised else everything[n.args[0].name] for n in unit.weights
        ]
        with torch.no_grad():
            got = part(*given, rows, *weights)
        wanted = (*unit.outputs, *unit.inner)
        assert len(got) == len(wanted) > 0
        for node, value in zip(wanted, got, strict=True):
            assert torch.equal(value, inside[node.name]), f"{unit.path}: %{node.name}"


def test_the_layer_that_makes_the_output_is_no_inner_layer() -> None:
    gm = graph()
    by_path = {unit.path: unit for unit in units(gm)}
    block = by_path["down_resnet"]
    names = {n.name for n in block.inner}
    layers = [n for n in block.nodes if is_layer(n)]
    assert len(layers) == 3, "conv1, time_emb_proj, conv2"
    assert {n.name for n in layers} - names == {layers[-1].name}, "conv2 makes the output"
    lone = by_path["downsample.conv"]
    assert lone.inner == ()


def test_every_layer_can_be_a_unit_of_its_own() -> None:
    gm = graph()
    found = units(gm, by_layer=True)
    assert all(len(unit.weights) == 1 and not unit.inner for unit in found)
    assert len(found) == sum(len(unit.weights) for unit in units(gm))
    taken = [q for unit in found for q in unit.quantisers]
    assert len(taken) == len(set(taken)), "a shared quantiser would be learned twice"


def test_options_reach_the_quantiser() -> None:
    gm = graph()
    seen: list[tuple[Any, ...]] = []

    def spy(x: Tensor, *rest: Any) -> Tensor:
        seen.append(rest[1:])
        return x

    unit = units(gm)[0]
    inside = values(gm)
    part = extract(gm, unit, spy, 0.25)
    part(*(inside[n.name] for n in unit.inputs), None, *(inside[w.name] for w in unit.weights))
    assert seen
    assert all(call[-1] == 0.25 for call in seen)
