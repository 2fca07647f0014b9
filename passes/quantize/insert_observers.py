"""Put an observer on every edge that annotate gave a spec."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.graph.edges import Edge, edge_root, quantised_edges
from fxquant.graph.nodes import fake_mode, refresh, write_note
from fxquant.graph.options import Options
from fxquant.graph.samples import has_samples
from fxquant.graph.stages import OBSERVERS
from fxquant.quant.observers import ObservedEdge
from fxquant.quant.spec import QuantSpec

GROUP = "group"


def insert_observers(gm: GraphModule, *, options: Options) -> GraphModule:
    """Observers follow the root of their edge; a new input says each sample's timestep group.

        %conv2d: f32[Bx32x8hx8w] = conv2d(%silu:u8/t, conv1.weight:i8/c0, conv1.bias)
    becomes
        %group: i64[B] = input
        %observe_0: f32[Bx32x8hx8w] = observe(%silu, %group)
        %conv2d: f32[Bx32x8hx8w] = conv2d(%observe_0:u8/t, conv1.weight:i8/c0, conv1.bias)
    """
    group = add_group_input(gm)
    by_index: dict[int, list[Edge]] = {}
    for edge in [e for n in gm.graph.nodes for e in quantised_edges(n)]:
        assert edge.spec
        by_index.setdefault(edge.spec["index"], []).append(edge)
    roots = {e: edge_root(e, shared) for shared in by_index.values() for e in shared}
    for shared in by_index.values():
        root = roots[shared[0]][0]
        observer = _insert(gm, root, group, shared[0], options.recipe.timestep_groups)
        for edge in shared:
            chain = roots[edge][1]
            if chain:
                chain[-1].replace_input_with(root, observer)
            else:
                edge.reader.update_arg(edge.position, observer)
    return gm


def add_group_input(gm: GraphModule) -> Node:
    """A placeholder int64 [B] after the existing inputs."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    first = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_after(last):
        group = gm.graph.placeholder(GROUP)
    with fake_mode(gm):
        group.meta["val"] = torch.empty(first.meta["val"].shape[0], dtype=torch.int64)
    return group


def _insert(gm: GraphModule, root: Node, group: Node, edge: Edge, groups: int) -> Node:
    spec = edge.spec
    assert spec
    name = f"{OBSERVERS}.{spec['index']}"
    observer = ObservedEdge(QuantSpec.from_json(spec), groups, has_samples(root))
    gm.add_submodule(name, observer)
    with gm.graph.inserting_after(max(root, group)):  # inputs and parameters may come before it
        node = gm.graph.call_module(name, (root, group))
    node.name = f"observe_{spec['index']}"
    node.meta = {"custom": edge.reader.meta["custom"]}
    write_note(node, quant=None, timestep_only=None)
    refresh(gm, node)
    return node
