"""What multiplies and is only read by a quantiser writes integers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.graph.lowered import PRODUCTS, arguments, ops, take_over
from fxquant.graph.nodes import calls, only_user
from fxquant.graph.options import Options


def fuse_requantize(gm: GraphModule, *, options: Options) -> GraphModule:
    """The float result of such a layer never reaches memory.

        %linear: f32[BxLx64] = fxquant.linear(%fq_0, ..., gelu, None, -1, 8, f32)
        %fq_1: u8[BxLx64] = fxquant.quantize(%linear, %row, 1, 8, none, u8)
    becomes
        %fq_1: u8[BxLx64] = fxquant.linear(%fq_0, ..., gelu, None, 1, 8, u8)
    and, where a linear makes both halves of a GEGLU,
        %linear: f32[BxLx128] = fxquant.linear(%fq_0, ...)
        %fq_1: u8[BxLx64] = fxquant.geglu_quantize(%linear, %row, 1, 8, none, u8)
    becomes
        %fq_1: u8[BxLx64] = fxquant.linear(%fq_0, ..., geglu, None, 1, 8, u8)
    """
    for quantize in calls(gm, ops.quantize.default, ops.geglu_quantize.default):
        product = quantize.args[0]
        assert isinstance(product, Node)
        if product.target in PRODUCTS and only_user(product) is quantize:
            changes = _changes(arguments(product), arguments(quantize), product.target)
            if changes:
                args = tuple({**arguments(product), **changes}.values())
                take_over(gm, quantize, product.target, args, like=product)
                gm.graph.erase_node(product)
    return gm


def _changes(product: Mapping[str, Any], quantise: Mapping[str, Any], op: Any) -> dict[str, Any]:
    """The product's arguments that change; none if the quantiser's work would not come last."""
    end = {k: quantise[k.removeprefix("out_")] for k in ("out_index", "out_bits", "out_dtype")}
    if product["out_index"] >= 0:
        return {}
    if "approximate" not in quantise:
        return end if quantise["activation"] == "none" else {}
    if op is not ops.linear.default or product["activation"] != "none" or product["residual"]:
        return {}
    return end | {"activation": "geglu_tanh" if quantise["approximate"] == "tanh" else "geglu"}
