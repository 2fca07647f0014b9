"""Streams: every value is that of the whole graph, and nothing is kept for longer than needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.interpret import Watched
from fxquant.graph.specialise import specialise
from fxquant.reconstruction.cache import Cache
from fxquant.reconstruction.reconstruct import bypassed
from fxquant.reconstruction.stream import Samples, Stream
from fxquant.reconstruction.subgraph import units
from tests.toy import relative_error, story


def samples(count: int = 5) -> Samples:
    calls = story().calls
    tensors = tuple(torch.cat([call[k] for call in calls])[:count] for k in range(len(calls[0])))
    return Samples(tensors, torch.zeros(count, dtype=torch.int64))


def whole(gm: GraphModule, of: Samples, table: Tensor, batch: int) -> dict[str, Tensor]:
    """Every tensor of the graph, the samples run in batches."""
    found: dict[str, list[Tensor]] = {}

    def see(node: Node, value: Any, env: dict[Node, Any]) -> None:
        if isinstance(value, Tensor):
            found.setdefault(node.name, []).append(value)

    for index in torch.arange(len(of)).split(batch):
        with torch.no_grad():
            Watched(gm, see).run(*(t[index] for t in of.tensors), table[of.rows[index]])
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("budget", [0, 1 << 30])
@pytest.mark.parametrize("floats", [False, True])
def test_unit_inputs_are_those_of_the_whole_graph(budget: int, floats: bool) -> None:
    toy, of = story(), samples()
    gm = specialise(toy.fake.graph, of.tensors)
    found = units(gm)
    gm = bypassed(gm) if floats else gm
    expected = whole(gm, of, toy.fake.table.values, 2)
    everyone = torch.arange(len(of))
    with Cache(budget) as cache:
        stream = Stream(gm, of, cache, 2)
        for unit in found:
            names = [n.name for n in unit.inputs]
            stream.advance(names, toy.fake.table.values)
            for name in names:
                # layouts differ, and a value near the middle of two steps may then round otherwise
                error = relative_error(stream[name][everyone], expected[name])
                assert error < (1e-5 if floats else 1e-2), f"{unit.path} {name}"
        if budget == 0:
            assert cache.spilled
            assert not cache.used


def test_nothing_is_kept_that_no_node_ahead_reads() -> None:
    toy, of = story(), samples()
    gm = specialise(toy.fake.graph, of.tensors)
    with Cache(1 << 30) as cache:
        stream = Stream(gm, of, cache, 2)
        held = []
        first = next(n.name for n in units(gm)[0].inputs if n.op != "placeholder")
        for unit in units(gm):
            stream.advance([n.name for n in unit.inputs], toy.fake.table.values)
            held.append(cache.used)
        with pytest.raises(KeyError):
            stream[first]  # read for the last time long ago
    everything = whole(gm, of, toy.fake.table.values, 2).values()
    total = sum(t[0].numel() * t.element_size() * len(of) for t in everything)
    assert max(held) < 0.2 * total, "the stream holds most of the model's values"


def test_weights_that_change_ahead_of_the_stream_are_used() -> None:
    toy, of = story(), samples()
    gm = specialise(toy.fake.graph, of.tensors)
    first, second = units(gm)[:2]
    table = toy.fake.table.values

    def second_input(change: bool) -> Tensor:
        with Cache(1 << 30) as cache:
            stream = Stream(gm, of, cache, 2)
            stream.advance([n.name for n in first.inputs], table)
            other = table.clone()
            if change:
                other[:, list(first.quantisers), 0] *= 8
            names = [n.name for n in second.inputs if n.op != "placeholder"]
            stream.advance(names, other)
            return stream[names[0]][torch.arange(len(of))]

    assert not torch.equal(second_input(True), second_input(False))
