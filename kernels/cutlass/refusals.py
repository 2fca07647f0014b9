"""Which layers the CUTLASS kernels do not take, and why: asked when a graph is bound."""

from __future__ import annotations

import torch

from fxquant.kernels import reference
from fxquant.kernels.config import MOST_PRODUCTS, Config
from fxquant.kernels.cuda import build, launch
from fxquant.kernels.cutlass.choose import fitting

_NATIVE_INT4 = ("8.0", "8.6", "8.9")


def why_not(types: str, config: Config) -> str | None:
    """Why operands of such types, as in `gemm.Products`, cannot be multiplied."""
    return _wrong_bits(types, config) or _wrong_machine(types, config) or _wrong_call(config)


def _wrong_bits(types: str, config: Config) -> str | None:
    low, high = (5, 8) if types == "s8" else (2, 4)
    bits = config.options["weight_bits"]
    if not low <= bits <= high:
        return f"its weights have {low} to {high} bits, not {bits}"
    x_bits = config.options.get("x_bits", 8)
    if types == "s4" and x_bits > 4:
        return f"its activations have at most 4 bits, not {x_bits}"
    if types == "s4" and config.machine.cuda not in (None, *_NATIVE_INT4):
        return (
            f"a GPU of compute capability {config.machine.cuda} multiplies no 4-bit integers: "
            "weights are unpacked to 8 bits"
        )
    return None


def _wrong_machine(types: str, config: Config) -> str | None:
    if reason := build.why_not(config.machine.cuda):
        return reason
    there, needed = config.machine.cuda_kernels, set[str]()
    if types != "s8":
        needed.add("weights")
    if config.options.get("activation") in reference.GATED:
        needed.add("producers")
    ops = ("gemm",) if config.op == "linear" else ("gemm", "conv")
    multiplied = "s4" if types == "s4" else "s8"  # what every GPU can fall back to
    if needed <= there and all(fitting(op, multiplied, there) for op in ops):
        return None
    return f"its libraries are not built; `{build.command(config.machine.cuda or '')}` builds them"


def _wrong_call(config: Config) -> str | None:
    if config.tensors["x"].dtype != torch.int8:
        return f"its activations are stored as int8, not {config.tensors['x'].dtype}"
    if config.options.get("groups", 1) != 1:
        return f"it has no grouped convolution ({config.options['groups']} groups)"
    if config.products > MOST_PRODUCTS:
        return f"int32 holds the sum of {MOST_PRODUCTS} products"
    if config.options.get("out_dtype", torch.float32) not in launch.TYPES:
        return f"it does not write {config.options['out_dtype']}"
    return None
