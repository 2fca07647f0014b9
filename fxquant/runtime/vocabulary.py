"""What a saved graph may say: its operators, and how arguments are written as JSON.

An operator that is not listed here is neither written nor read. All are pure functions of
tensors and sizes: none draws random numbers, writes into its input, or reaches outside.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from fxquant.errors import ArtifactError
from fxquant.graph.nodes import is_symbolic
from fxquant.kernels.ops import SCHEMAS
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from fxquant.runtime.fields import Field

ATEN = (
    "abs.default", "add.Scalar", "add.Tensor", "alias.default", "amax.default", "amin.default",
    "arange.default", "arange.start", "arange.start_step", "avg_pool2d.default",
    "baddbmm.default", "bitwise_and.Tensor", "bitwise_not.default", "bitwise_or.Tensor",
    "bmm.default", "cat.default", "chunk.default", "clamp.default", "clamp_max.default",
    "clamp_min.default", "clone.default", "concat.default", "constant_pad_nd.default",
    "contiguous.default", "conv1d.default", "conv2d.default", "conv2d.padding",
    "conv_transpose2d.input", "cos.default", "cumsum.default", "detach.default", "div.Scalar",
    "div.Tensor", "einsum.default", "elu.default", "embedding.default", "eq.Scalar", "eq.Tensor",
    "exp.default", "expand.default", "expand_as.default", "expm1.default", "flatten.using_ints",
    "flip.default", "floor.default", "full.default", "full_like.default", "ge.Scalar",
    "ge.Tensor", "gelu.default", "glu.default", "group_norm.default", "gt.Scalar", "gt.Tensor",
    "hardswish.default", "index_select.default", "layer_norm.default", "le.Scalar", "le.Tensor",
    "leaky_relu.default", "linear.default", "log.default", "log1p.default", "logical_and.default",
    "logical_not.default", "logical_or.default", "logsumexp.default", "lt.Scalar", "lt.Tensor",
    "masked_fill.Scalar", "masked_fill.Tensor", "matmul.default", "max_pool2d.default",
    "maximum.default", "mean.default", "mean.dim", "minimum.default", "mish.default",
    "mm.default", "movedim.int", "mul.Scalar", "mul.Tensor", "narrow.default", "ne.Scalar",
    "ne.Tensor", "neg.default", "new_ones.default", "new_zeros.default", "ones.default",
    "ones_like.default", "outer.default", "pad.default", "permute.default",
    "pixel_shuffle.default", "pixel_unshuffle.default", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "reciprocal.default", "relu.default", "repeat.default", "repeat_interleave.self_int",
    "reshape.default", "rms_norm.default", "round.default", "rsqrt.default", "rsub.Scalar",
    "scalar_tensor.default", "scaled_dot_product_attention.default", "select.int",
    "sigmoid.default", "sign.default", "silu.default", "sin.default", "slice.Tensor",
    "softmax.int", "softplus.default", "split.Tensor", "split_with_sizes.default", "sqrt.default",
    "square.default", "squeeze.default", "squeeze.dim", "stack.default", "std.correction",
    "sub.Scalar", "sub.Tensor", "sum.default", "sum.dim_IntList", "sym_size.int", "t.default",
    "tan.default", "tanh.default", "to.device", "to.dtype", "to.dtype_layout", "transpose.int",
    "tril.default", "triu.default", "type_as.default", "unbind.int", "unflatten.int",
    "unsqueeze.default", "upsample_bilinear2d.vec", "upsample_nearest2d.default",
    "upsample_nearest2d.vec", "var.correction", "var_mean.correction", "view.default",
    "where.self", "zeros.default", "zeros_like.default",
    "diagonal_scatter.default", "index_put.default", "select_scatter.default",
    "slice_scatter.default",
)  # fmt: skip
FXQUANT = tuple(f"{op}.default" for op in SCHEMAS)
SIZES: dict[str, Callable[..., Any]] = {  # what sizes are computed with
    f"operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod")
}
GETITEM = "operator.getitem"  # an item of what split and its like return
_PYTHON: dict[str, Callable[..., Any]] = {
    **SIZES,
    GETITEM: operator.getitem,
    "simulate.fake_quantize": fake_quantize,  # layers with more bits than any kernel has
    "simulate.fake_quantize_weight": fake_quantize_weight,
}

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64,
        torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
    )
}  # fmt: skip
_LAYOUTS = {
    str(value).removeprefix("torch."): value
    for value in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}
_DEPTH = 4  # of lists in arguments


@functools.cache
def operators() -> Mapping[str, Callable[..., Any]]:
    """Every operator of the format by its name."""
    found = dict(_PYTHON)
    for prefix, names in (("aten", ATEN), ("fxquant", FXQUANT)):
        for name in names:
            op, overload = name.split(".")
            packet = getattr(getattr(torch.ops, prefix), op)
            found[f"{prefix}.{name}"] = getattr(packet, overload)
    return found


@functools.cache
def _names() -> Mapping[Any, str]:
    return {target: name for name, target in operators().items()}


def name_of(node: Node) -> str:
    """The format's name of what a node calls.

    Raises:
        ArtifactError: the format has no name for it.
    """
    name = _names().get(node.target) if node.op == "call_function" else None
    if name is None:
        raise ArtifactError(
            f"node %{node.name} calls {node.target}, which the saved form does not know; keep that "
            "part out of the compiled module, or ask for the operator to be added"
        )
    return name


def encoded(value: Any) -> Any:
    """An argument as JSON: {"node": name}, {"tensor": target}, {"dtype": name} ... or itself.

    Raises:
        ArtifactError: a kind of value that the format does not have.
    """
    if isinstance(value, Node):
        kind, name = (
            ("tensor", str(value.target)) if value.op == "get_attr" else ("node", value.name)
        )
        return {kind: name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [encoded(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # where it runs is settled when it is loaded
    if value is torch.strided:
        return {"layout": "strided"}
    raise ArtifactError(f"the saved form has no {type(value).__name__} arguments ({value!r})")


def decoded(field: Field, reference: Callable[[str, Field], Node], depth: int = _DEPTH) -> Any:
    """Inverse of `encoded`.

    Args:
        reference: the node for a {"node": ...} or {"tensor": ...}; raises for an unknown one.
    """
    value = field.value
    if value is None or type(value) is bool:
        return value
    if type(value) is int:
        return field.integer()
    if type(value) is float:
        return field.number()
    if type(value) is str:
        return field.text(limit=64)
    if type(value) is list:
        if depth == 0:
            field.fail("is nested too deeply")
        return [decoded(item, reference, depth - 1) for item in field.items(4096)]
    ((kind, member),) = _single(field)
    if kind in ("node", "tensor"):
        return reference(kind, member)
    return _constant(kind, member)


def _single(field: Field) -> list[tuple[str, Field]]:
    members = list(field.members(limit=1).items())
    if not members:
        field.fail("is an empty object")
    return members


def _constant(kind: str, field: Field) -> Any:
    if kind == "float":
        return float(field.one_of(("inf", "-inf", "nan")))
    if kind == "dtype":
        return DTYPES[field.one_of(DTYPES)]
    if kind == "layout":
        name = field.one_of((*_LAYOUTS, "strided"))
        return torch.strided if name == "strided" else _LAYOUTS[name]
    if kind != "device":
        field.fail(f"unknown kind of argument {kind!r}")
    return torch.device(field.one_of(("cpu",)))


def is_size(value: Any) -> bool:
    """May it be computed with: an integer, or a node that is one?"""
    if isinstance(value, Node):
        return is_symbolic(value)
    return type(value) is int
