"""Watching a graph run."""

from __future__ import annotations

import torch

from fxquant.graph.interpret import Watched
from tests.toy import story


def test_every_node_is_seen_with_its_value_and_its_inputs():
    gm, seen = story()["mark_timestep_only"], {}

    def see(node, value, env):
        assert all(i in env for i in node.all_input_nodes)
        seen[node.name] = value

    result = Watched(gm, see).run(*story().calls[0])
    assert list(seen) == [n.name for n in gm.graph.nodes]
    assert torch.equal(seen["output"], result)
    assert torch.equal(result, story().run(gm))
