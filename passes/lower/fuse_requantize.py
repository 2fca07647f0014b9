"""A layer whose only reader quantises its result writes integers itself."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxquant.graph.lowered import LAYERS, arguments, ops, take_over
from fxquant.graph.nodes import calls, only_user
from fxquant.graph.options import Options


def fuse_requantize(gm: GraphModule, *, options: Options) -> GraphModule:
    """The float result of such a layer never reaches memory.

        %linear: f32[BxLx64] = fxquant.linear(%fq_0, ..., gelu, None, -1, 8, f32)
        %fq_1: u8[BxLx64] = fxquant.quantize(%linear, %row, 1, 8, none, u8)
    becomes
        %fq_1: u8[BxLx64] = fxquant.linear(%fq_0, ..., gelu, None, 1, 8, u8)
    """
    for quantize in calls(gm, ops.quantize.default):
        layer = quantize.args[0]
        assert isinstance(layer, Node)
        if layer.target in LAYERS and only_user(layer) is quantize and _fits(layer, quantize):
            q = arguments(quantize)
            changes = {"out_index": q["index"], "out_bits": q["bits"], "out_dtype": q["dtype"]}
            take_over(
                gm,
                quantize,
                layer.target,
                tuple({**arguments(layer), **changes}.values()),
                like=layer,
            )
            gm.graph.erase_node(layer)
    return gm


def _fits(layer: Node, quantize: Node) -> bool:
    """The quantize's activation would come after the layer's own."""
    return bool(arguments(quantize)["activation"] == "none" and arguments(layer)["out_index"] < 0)
