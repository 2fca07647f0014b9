"""Which operators forgive 16-bit values, by name: everything that is not listed here does not.

Rounding to bfloat16 or float16 is an error of up to 1 in 256 of each value. What adds, weighs and
averages passes it on as it is, which image-sized values can bear. What counts, compares, indexes,
wraps around or exponentiates does not (sin(1003) is not sin(1000)), and many rarer operators have
no kernel for 16 bits at all: so an unknown operator computes in float32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from fxquant.graph.nodes import argument, aten

# Multiply by, or look up, or scale by, learned numbers: features begin here.
_LEARNED = frozenset({
    "addmm", "baddbmm", "batch_norm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "convolution", "dot", "einsum", "embedding",
    "group_norm", "instance_norm", "layer_norm", "linear", "matmul", "mm", "mv", "rms_norm",
    "scaled_dot_product_attention", "tensordot",
})  # fmt: skip
# Only make what they are told, whatever tensor they are given.
_CREATE = frozenset({
    "empty", "empty_like", "eye", "full", "full_like", "new_empty", "new_full", "new_ones",
    "new_zeros", "ones", "ones_like", "scalar_tensor", "zeros", "zeros_like",
})  # fmt: skip
_CONVERT = frozenset({"_to_copy", "to", "type_as"})
_ELEMENTWISE = frozenset({
    "abs", "absolute", "add", "addcdiv", "addcmul", "celu", "clamp", "clamp_max", "clamp_min",
    "clip", "div", "dropout", "elu", "erf", "feature_dropout", "fmax", "fmin", "gelu", "glu",
    "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "lerp", "log_sigmoid",
    "log_softmax", "masked_fill", "maximum", "minimum", "mish", "mul", "multiply", "nan_to_num",
    "neg", "negative", "pow", "prelu", "reciprocal", "relu", "relu6", "rsqrt", "rsub", "selu",
    "sigmoid", "silu", "softmax", "softplus", "softshrink", "sqrt", "square", "sub", "subtract",
    "tanh", "threshold", "true_divide", "where",
})  # fmt: skip
_REDUCE = frozenset({
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "amax", "amin", "avg_pool1d", "avg_pool2d",
    "linalg_vector_norm", "max_pool1d", "max_pool2d", "mean", "std", "std_mean", "sum", "var",
    "var_mean",
})  # fmt: skip
_MOVE = frozenset({
    "alias", "as_strided", "broadcast_to", "broadcast_tensors", "cat", "channel_shuffle", "chunk",
    "clone", "col2im", "concat", "concatenate", "constant_pad_nd", "contiguous", "copy", "detach",
    "diag", "diag_embed", "diagonal", "diagonal_scatter", "expand", "expand_as", "flatten",
    "flip", "gather", "getitem", "hstack", "im2col", "index", "index_add", "index_copy",
    "index_put", "index_select", "lift_fresh_copy", "masked_scatter", "meshgrid", "movedim",
    "moveaxis", "narrow", "narrow_copy", "outer", "pad", "permute", "pixel_shuffle",
    "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "repeat",
    "repeat_interleave", "replication_pad1d", "replication_pad2d", "replication_pad3d", "reshape",
    "roll", "rot90", "scatter", "scatter_add", "select", "select_scatter", "slice",
    "slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t",
    "take_along_dim", "tensor_split", "tile", "transpose", "tril", "triu", "unbind", "unflatten",
    "unfold", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze",
    "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "view",
    "view_as", "vstack",
})  # fmt: skip
_KNOWN = _LEARNED | _CREATE | _CONVERT | _ELEMENTWISE | _REDUCE | _MOVE
# Whatever goes in, what comes out is a moderate number.
_BOUNDED = frozenset({"reciprocal", "rsqrt", "sigmoid", "softmax", "tanh"})
_SQUARES = frozenset({"pow", "square"})
_STEEPEST = 4  # a power multiplies a relative error by its exponent


def name(node: Node) -> str:
    """The operator without namespace and overload: "add" of aten.add.Tensor."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname if node.target.namespace == "aten" else str(node.target)
    return "getitem" if node.target is operator.getitem else str(node.target)


def forgives(node: Node) -> bool:
    """May the node read and write 16-bit floats, as far as its operator is concerned?"""
    if node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode):
        return argument(node, 2, "rounding_mode") is None
    if name(node) == "pow":
        power = argument(node, 1, "exponent")
        return isinstance(power, (int, float)) and abs(power) <= _STEEPEST
    return name(node) in _KNOWN


def is_learned(node: Node) -> bool:
    """Does the operator read learned weights, or multiply what others computed?"""
    return name(node) in _LEARNED


def is_creation(node: Node) -> bool:
    """Does the result depend on no element of any input?"""
    return name(node) in _CREATE


def is_conversion(node: Node) -> bool:
    """Does the operator change a dtype?"""
    return name(node) in _CONVERT


def is_bounded(node: Node) -> bool:
    """Is the result a moderate number for any input?"""
    return name(node) in _BOUNDED


def leaves_range(node: Node, dtype: torch.dtype) -> bool:
    """Does the node use a number that this dtype cannot hold, or make one out of moderate ones?

    Masks of -3.4e38 become -inf in bfloat16, and a row of nothing else NaN; 300 squared is inf in
    float16.
    """
    if is_learned(node):
        return False
    if dtype == torch.float16 and name(node) in _SQUARES:
        return True
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    return any(
        math.isfinite(s) and s and not smallest <= abs(s) <= info.max for s in _scalars(node)
    )


def _scalars(node: Node) -> Iterator[float]:
    """The numbers that a call takes in place of tensors."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
    given |= node.kwargs
    for field in node.target._schema.arguments:
        value = given.get(field.name)
        if isinstance(value, (int, float)) and str(field.type) in ("number", "Tensor"):
            yield float(value)
