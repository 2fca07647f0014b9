"""Observers become fake-quant nodes; weights get theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.nodes import (
    attribute,
    call,
    fake_mode,
    free_target,
    get_attr,
    is_layer,
    note,
    replace,
    set_buffer,
    write_note,
)
from fxquant.graph.options import Options
from fxquant.graph.stages import OBSERVERS
from fxquant.logs import progress
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from fxquant.quant.search import absmax_weight_scale, pnorm_weight_scale
from fxquant.quant.spec import QuantSpec

ROW = "row"


def observers_to_fake_quant(gm: GraphModule, *, options: Options) -> GraphModule:
    """Scales and zero points come in as `row`, [n, 2], or [B, n, 2] for a row per sample.

        %observe_0: f32[Bx32x8hx8w] = observe(%silu, %group)
        %conv2d: f32[Bx32x8hx8w] = conv2d(%observe_0:u8/t, conv1.weight:i8/c0, conv1.bias)
    becomes
        %fq_0: f32[Bx32x8hx8w] = fake_quantize(%silu, %row, 0, 8)
        %fq_weight: f32[...] = fake_quantize_weight(conv1.weight, conv1.weight_scale, 8)
        %conv2d: f32[Bx32x8hx8w] = conv2d(%fq_0:u8/t, %fq_weight:i8/c0, conv1.bias)
    """
    observers = [
        n for n in gm.graph.nodes if n.op == "call_module" and str(n.target).startswith(OBSERVERS)
    ]
    row = _group_input_becomes_row(gm, len(observers))
    for node in observers:
        index = int(str(node.target).rpartition(".")[2])
        bits = attribute(gm, str(node.target)).spec.bits
        with gm.graph.inserting_before(node):
            new = call(gm, fake_quantize, (node.args[0], row, index, bits), like=node)
        new.name = f"fq_{index}"
        replace(node, new)
    gm.graph.erase_node(
        next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "group")
    )
    layers = [n for n in gm.graph.nodes if is_layer(n)]
    for layer in progress(layers, "quantise weights", "layer", show=options.progress):
        spec = (note(layer, "quant") or {}).get("weight")
        if spec:
            _fake_quantise_weight(gm, layer, spec)
    return gm


def _group_input_becomes_row(gm: GraphModule, quantisers: int) -> Node:
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        row = gm.graph.placeholder(ROW)
    with fake_mode(gm):
        row.meta["val"] = torch.empty(quantisers, 2)
    return row


def _fake_quantise_weight(gm: GraphModule, layer: Node, spec: dict[str, Any]) -> None:
    weight = layer.args[1]
    assert isinstance(weight, Node)
    name = str(weight.target)
    scale = weight_scale(attribute(gm, name), QuantSpec.from_json(spec))
    target = set_buffer(gm, free_target(gm, f"{name}_scale"), scale)
    with gm.graph.inserting_before(layer):
        args = (weight, get_attr(gm, target, like=layer), spec["bits"])
        new = call(gm, fake_quantize_weight, args, like=layer)
        for node in (new, new.args[1]):
            write_note(node, quant=None)  # type: ignore[arg-type]
    new.name = "fq_" + name.replace(".", "_")
    layer.update_arg(1, new)


def weight_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """float32 [N], the step size of each output channel: all equal where the spec has one."""
    searched = spec.observer == "pnorm" and not weight.is_meta  # of no values any scale will do
    search = pnorm_weight_scale if searched else absmax_weight_scale
    if spec.channel_axis is None:
        return search(weight.detach().reshape(1, -1), spec.bits).repeat(weight.shape[0])
    return search(weight, spec.bits)
