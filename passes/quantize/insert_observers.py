"""Put an observer on every edge that annotate gave a spec."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.graph.edges import edge_root
from fxquant.graph.nodes import fake_mode, is_layer, note, refresh, write_note
from fxquant.graph.options import Options
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
    layers = [n for n in gm.graph.nodes if is_layer(n) and "input" in (note(n, "quant") or {})]
    edges = {layer: note(layer, "quant")["input"] for layer in layers}
    roots = {
        layer: edge_root(layer, {n for n in layers if edges[n]["index"] == edge["index"]})
        for layer, edge in edges.items()
    }
    observers: dict[int, Node] = {}
    for layer, edge in edges.items():
        root, chain = roots[layer]
        if edge["index"] not in observers:
            observers[edge["index"]] = _insert(
                gm, root, group, layer, edge, options.recipe.timestep_groups
            )
        first = chain[-1] if chain else layer
        first.replace_input_with(root, observers[edge["index"]])
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


def _insert(
    gm: GraphModule, root: Node, group: Node, layer: Node, edge: dict[str, Any], groups: int
) -> Node:
    name = f"{OBSERVERS}.{edge['index']}"
    gm.add_submodule(name, ObservedEdge(QuantSpec.from_json(edge), groups))
    after = root if root.op != "placeholder" else group
    with gm.graph.inserting_after(after):
        node = gm.graph.call_module(name, (root, group))
    node.name = f"observe_{edge['index']}"
    node.meta = {"custom": layer.meta["custom"]}
    write_note(node, quant=None, timestep_only=None)
    refresh(gm, node)
    return node
