"""Weights in the order their kernels want, all made when a model is loaded.

Left to the first call, canonical and packed weights would be in memory together. Here each
canonical weight goes back to its file as soon as it is packed, so that serving holds one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.lowered import LAYERS, arguments, ops
from fxquant.graph.nodes import attribute
from fxquant.kernels.cutlass.gemm import INT4, INT8, W4A4
from fxquant.kernels.x86 import gemm, onednn

_PACKING: dict[str, Any] = {
    "gemm": gemm, "gemm_int4": gemm, "onednn": onednn, "onednn_int4": onednn,
    "cutlass": INT8, "cutlass_int4": INT4, "cutlass_w4a4": W4A4,
}  # fmt: skip


def pack_weights(bound: GraphModule, release: Callable[[str], None]) -> None:
    """Pack what the bound graph's kernels would pack at their first call.

    Args:
        release: called with the target of each weight that was packed.
    """
    for node in bound.graph.nodes:
        if node.op == "call_function" and node.target in LAYERS and node.args[-1] in _PACKING:
            given = arguments(node)
            target = str(given["weight"].target)
            _pack(node, given, attribute(bound, target))
            release(target)


def _pack(node: Node, given: dict[str, Any], weight: Tensor) -> None:
    kernels, bits = _PACKING[given["kernel"]], given["weight_bits"]
    shape = given["x"].meta["val"].shape
    if node.target is ops.conv2d.default:
        kernels.prepare_conv2d(weight, bits, int(shape[1]), given["kernel_size"])
    else:
        kernels.prepare_linear(weight, bits, int(shape[-1]), given["activation"])
