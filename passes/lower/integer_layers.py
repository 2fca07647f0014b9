"""Fake-quantised layers become integer layers; attention becomes one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.edges import Edge, edge_source, edges, layout_chain
from fxquant.graph.lowered import ops, take_over
from fxquant.graph.nodes import (
    CONSTANT_PAD,
    CONV2D,
    PAD,
    argument,
    attribute,
    call,
    get_attr,
    is_attention,
    is_layer,
    refresh_after,
    replace,
    set_buffer,
    shape,
    write_note,
)
from fxquant.graph.options import Options
from fxquant.kernels.int4 import pack_int4
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from fxquant.quant.uniform import per_channel, quantize, weight_range


def integer_layers(gm: GraphModule, *, options: Options) -> GraphModule:
    """fake_quantize becomes quantize; conv2d and linear multiply integers. Padding moves inside.

    Attention multiplies integers where q, k and v are quantised. Layers with more than 8 bits stay
    simulated: there is no kernel for them. Operators name the reference kernel until
    select_kernels, and integers are stored as uint8 until set_storage_dtype.

        %fq_0: f32[Bx32x8hx8w] = fake_quantize(%silu, %row, 0, 8)
        %conv2d: f32[...] = conv2d(%fq_0, %fq_conv1_weight, conv1.bias, [1, 1], [1, 1])
    becomes
        %fq_0: u8[Bx32x8hx8w] = fxquant.quantize(%silu, %row, index=0, bits=8, dtype=u8)
        %conv2d: f32[...] = fxquant.conv2d(%fq_0, %row, x_index=0, conv1.weight, ...)
    """
    layers = [n for n in gm.graph.nodes if is_layer(n) and _has_kernel(n)]
    attention = [n for n in gm.graph.nodes if is_attention(n)]
    pads = {layer: _pad_before(layer) for layer in layers}
    for layer, pad in pads.items():
        if pad is not None:
            layer.args = (pad.args[0], *layer.args[1:])
    sources = {e: edge_source(e) for n in (*layers, *attention) for e in edges(n)}
    roots = dict.fromkeys(s for s in sources.values() if s.target is fake_quantize)
    quantised = {root: _quantise(gm, root) for root in roots}
    for layer, pad in pads.items():
        _lower(gm, layer, quantised[sources[Edge(layer, "input")]], pad)
    row = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "row")
    for node in attention:
        _lower_attention(gm, node, row, [quantised.get(sources[e]) for e in edges(node)])
    gm.graph.eliminate_dead_code()
    refresh_after(gm, [n for n in gm.graph.nodes if n.target is ops.quantize.default])
    return gm


def _has_kernel(layer: Node) -> bool:
    root = edge_source(Edge(layer, "input"))
    weight = layer.args[1]
    assert isinstance(weight, Node)
    if root.target is not fake_quantize or weight.target is not fake_quantize_weight:
        return False
    bits = (root.args[3], weight.args[2])
    return all(isinstance(b, int) and b <= 8 for b in bits)


def _pad_before(layer: Node) -> Node | None:
    """The padding directly before a layer."""
    chain = layout_chain(Edge(layer, "input"))
    return chain[0] if chain and chain[0].target in (PAD, CONSTANT_PAD) else None


def _quantise(gm: GraphModule, root: Node) -> Node:
    """The quantize node in place of a fake_quantize; users keep reading it."""
    x, row, index, bits = root.args
    name = root.name
    with gm.graph.inserting_before(root):
        args = (x, row, index, bits, "none", torch.uint8, "reference")
        new = call(gm, ops.quantize.default, args, like=root)
    write_note(new, source=name)
    replace(root, new)
    new.name = name
    return new


def _lower(gm: GraphModule, layer: Node, quantised: Node, pad: Node | None) -> None:
    row, index = quantised.args[1:3]
    fake_weight, name = layer.args[1], layer.name
    assert isinstance(fake_weight, Node)
    weight, scale, bits = fake_weight.args
    with gm.graph.inserting_before(layer):
        integers = get_attr(gm, _integer_weight(gm, weight, scale, bits), like=layer)  # type: ignore[arg-type]
        head = (layer.args[0], row, index, integers, scale, argument(layer, 2, "bias"), bits)
        tail = ("none", None, -1, 8, layer.meta["val"].dtype, "reference")
        if layer.target is CONV2D:
            args = (*head, *_geometry(layer, weight, pad), None, *tail)  # type: ignore[arg-type]
            new = call(gm, ops.conv2d.default, args, like=layer)
        else:
            new = call(gm, ops.linear.default, (*head, *tail), like=layer)
    write_note(new, source=name)
    replace(layer, new)
    new.name = name


def _lower_attention(gm: GraphModule, node: Node, row: Node, quantised: list[Node | None]) -> None:
    """`quantised`: where q, k and v come from, if that is integers."""
    indices = [-1 if n is None else n.args[2] for n in quantised]
    q, k, v = node.args[:3]
    mask, scale = argument(node, 3, "attn_mask"), node.kwargs.get("scale")
    dtype = node.meta["val"].dtype
    args = (q, k, v, row, *indices, mask, scale, -1, 8, dtype, "reference")
    take_over(gm, node, ops.attention.default, args)


def _integer_weight(gm: GraphModule, weight: Node, scale: Node, bits: int) -> str:
    """Bind the integers of a weight under its own name; int4 is packed two to a byte."""
    name = str(weight.target)
    floats, scales = attribute(gm, name), attribute(gm, str(scale.target))
    return set_buffer(gm, name, integer_weight(floats, scales, bits))


def integer_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 of the weight's shape, or packed uint8 [N, ceil(K/2)] up to 4 bits."""
    step = per_channel(scale, weight.ndim, 0)
    q = quantize(weight.detach(), step, 0.0, *weight_range(bits)).to(torch.int8)
    return pack_int4(q.flatten(1)) if bits <= 4 else q.contiguous()


def _geometry(conv: Node, weight: Node, pad: Node | None) -> tuple[Any, ...]:
    """kernel_size, stride, padding (top, bottom, left, right), dilation, groups."""
    stride, padding, dilation = (_pair(argument(conv, i, n, d)) for i, n, d in _WINDOW)
    sides = [padding[0], padding[0], padding[1], padding[1]]
    if pad is not None:
        left, right, top, bottom = (*argument(pad, 1, "pad"), 0, 0)[:4]
        sides = [s + p for s, p in zip(sides, (top, bottom, left, right), strict=True)]
    return list(shape(weight)[2:]), stride, sides, dilation, argument(conv, 6, "groups", 1)


_WINDOW = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))
