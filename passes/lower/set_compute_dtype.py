"""Choose the dtype of everything that stays float."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.lowered import arguments, is_op, ops
from fxquant.graph.nodes import (
    aten,
    attribute,
    call,
    calls,
    is_layer,
    note,
    refresh_after,
    replace,
    set_buffer,
    write_note,
)
from fxquant.graph.options import Options
from fxquant.graph.signature import TIMESTEP
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight

_WEIGHTED = {aten.embedding.default: 0}  # operators besides layers whose parameter sets the dtype


def set_compute_dtype(gm: GraphModule, *, options: Options) -> GraphModule:
    """Float layers hold their weights in the compute dtype and read their input in it.

    The sinusoid of the timestep stays float32 up to its first layer; norms keep float32 weights
    and statistics; simulated layers, whose integers have more bits than bfloat16, compute in
    float32. The graph's result returns to the model's dtype.

        %conv2d: f32[...] = conv2d(%sample, conv_in.weight, conv_in.bias)
        %conv2d_1: f32[...] = fxquant.conv2d(%fq_0, ..., f32)
    becomes
        %to: bf16[...] = to(%sample, bf16)
        %conv2d: bf16[...] = conv2d(%to, conv_in.weight, conv_in.bias)
        %conv2d_1: bf16[...] = fxquant.conv2d(%fq_0, ..., bf16)
    """
    dtype = options.compute_dtype
    output = next(n for n in gm.graph.nodes if n.op == "output")
    result = output.args[0].meta["val"].dtype
    for node in list(gm.graph.nodes):
        if node.op == "placeholder" and node.name not in (TIMESTEP, "row"):
            _cast_input(gm, node, dtype)
        elif node.target is fake_quantize:
            _read_in(gm, node, 0, torch.float32)
        elif is_layer(node):
            _cast_layer(gm, node, dtype)
        elif node.target in _WEIGHTED:
            _cast_parameter(gm, node.args[_WEIGHTED[node.target]], dtype)
        elif is_op(node) and _is_float(node):
            _set_output_dtype(node, dtype)
        elif (
            node.target is aten.to.dtype and note(node, "timestep_only") is None and _is_float(node)
        ):
            node.update_arg(1, dtype)
    refresh_after(gm, [n for n in gm.graph.nodes if n.op in ("get_attr", "placeholder")])
    _match_attention(gm, dtype)
    _drop_idle_casts(gm)
    if output.args[0].meta["val"].dtype != result:
        with gm.graph.inserting_before(output):
            output.args = (call(gm, aten.to.dtype, (output.args[0], result), like=output.args[0]),)
    return gm


def _is_float(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast_input(gm: GraphModule, node: Node, dtype: torch.dtype) -> None:
    if _is_float(node) and node.meta["val"].dtype != dtype:
        users = list(node.users)
        with gm.graph.inserting_after(_last_input(gm)):
            cast = call(gm, aten.to.dtype, (node, dtype), like=node)
        for user in users:
            user.replace_input_with(node, cast)


def _last_input(gm: GraphModule) -> Node:
    return [n for n in gm.graph.nodes if n.op == "placeholder"][-1]


def _cast_layer(gm: GraphModule, layer: Node, dtype: torch.dtype) -> None:
    x, weight = layer.args[:2]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if weight.target is fake_quantize_weight:
        _write_in(gm, layer, dtype)
        return
    for position, parameter in enumerate(layer.args[1:3], start=1):
        if isinstance(parameter, Node) and parameter.op == "get_attr":
            _cast_parameter(gm, parameter, dtype)
        elif isinstance(parameter, Node):
            _read_in(gm, layer, position, dtype)
    if x.op != "placeholder":
        _read_in(gm, layer, 0, dtype)


def _read_in(gm: GraphModule, node: Node, position: int, dtype: torch.dtype) -> None:
    """The node reads one argument in this dtype."""
    value = node.args[position]
    assert isinstance(value, Node)
    with gm.graph.inserting_before(node):
        node.update_arg(position, call(gm, aten.to.dtype, (value, dtype), like=value))


def _write_in(gm: GraphModule, node: Node, dtype: torch.dtype) -> None:
    """Everybody reads the node in this dtype."""
    readers = list(node.users)
    with gm.graph.inserting_after(node):
        cast = call(gm, aten.to.dtype, (node, dtype), like=node)
    write_note(cast, quant=None)
    for reader in readers:
        reader.replace_input_with(node, cast)


def _cast_parameter(gm: GraphModule, parameter: Node, dtype: torch.dtype) -> None:
    if parameter.op == "get_attr":
        value = attribute(gm, str(parameter.target)).detach().to(dtype)
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        set_buffer(gm, str(parameter.target), value)


def _set_output_dtype(node: Node, dtype: torch.dtype) -> None:
    name = "out_dtype" if "out_dtype" in arguments(node) else "dtype"
    names = list(arguments(node))
    if name in names:
        node.update_arg(names.index(name), dtype)


def _match_attention(gm: GraphModule, dtype: torch.dtype) -> None:
    for node in calls(gm, ops.attention.default):
        mask = arguments(node)["mask"]
        if isinstance(mask, Node) and _is_float(mask) and mask.meta["val"].dtype != dtype:
            with gm.graph.inserting_before(node):
                node.replace_input_with(mask, call(gm, aten.to.dtype, (mask, dtype), like=mask))


def _drop_idle_casts(gm: GraphModule) -> None:
    for node in calls(gm, aten.to.dtype):
        source = node.args[0]
        if isinstance(source, Node) and source.meta["val"].dtype == node.args[1]:
            replace(node, source)
