"""What a saved graph may call: names of functions, and the rule that says which there are.

Any operator of ATen that a captured graph can hold and that is a function of its arguments: its
schema writes nowhere and has plain arguments, it returns tensors, and it is neither a derivative
nor one of those that trust their caller. Names are looked up, never executed.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from fxquant.errors import ArtifactError
from fxquant.kernels.ops import SCHEMAS
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight

_NAME = re.compile(r"aten\.([A-Za-z0-9_]{1,100})\.([A-Za-z0-9][A-Za-z0-9_]{0,60})")
# Names with a leading underscore are ATen's own affair, but for these, which Python's operators and
# functions become.
_UNDERSCORED = frozenset(
    {
        "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_to_copy", "_unsafe_view",
        "_conj", "_conj_physical", "_neg_view", "_reshape_alias", "_shape_as_tensor", "_softmax",
        "_log_softmax", "_safe_softmax", "_weight_norm", "_weight_norm_interface", "_stack",
        "_cdist_forward", "_euclidean_dist", "_fused_rms_norm", "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
        "_fft_r2c", "_fft_c2r", "_fft_c2c", "_native_batch_norm_legit_no_training",
        "_convolution", "_convolution_mode", "_trilinear", "_is_all_true", "_is_any_true",
        "_linalg_det", "_linalg_svd", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex",
    }
)  # fmt: skip
# What the rule would let in and must not.
_REFUSED = re.compile(
    # derivatives: no forward has them, and they believe what the forward is said to have computed
    r".*backward.*|.*_jvp"
    # what reaches outside, or at memory that nobody wrote
    r"|from_file|pin_memory|empty.*|new_empty.*|as_strided.*|set|resize.*"
    # tensors that are not plain: sparse, quantised, packed for a library
    r"|(?:sparse|quantize|quantized|fbgemm|mkldnn|miopen|cudnn|mps)_.*|to_sparse.*|to_mkldnn"
    r"|choose_qparams.*"
    # kernels that crash: on what is not finite, on weights of other shapes
    r"|linalg_eig|linalg_eigvals|lstm"
    # indices or lengths inside tensors that kernels do not check
    r"|ctc_loss|segment_reduce|embedding_bag|embedding_renorm|fractional_max_pool.*"
    r"|lu_solve|lu_unpack|linalg_lu_solve|linalg_ldl_solve|.*_reduce_elemt|batch_norm_.*"
    # as much work as one number says
    r"|combinations|.*_polynomial_.*|mvlgamma|special_multigammaln"
)
_SCALARS = frozenset({"sym_size", "sym_numel", "sym_stride", "sym_storage_offset"})
_ARGUMENTS = re.compile(
    r"(?:Optional\[)?(?:List\[)?(?:Optional\[)?"
    r"(?:Tensor|int|SymInt|float|bool|number|str|Device|Generator)\]*"
)
# Fresh memory holds what was there before. Nobody can rely on it, and a file must not read it.
_WRITTEN = {
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
}
_BINARY = (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "lshift", "rshift", "and_", "or_",
    "xor", "eq", "ne", "lt", "le", "gt", "ge",
)  # fmt: skip
SIZES: dict[str, Callable[..., Any]] = {  # what sizes are computed with
    **{f"operator.{name}": getattr(operator, name) for name in (*_BINARY, "neg", "pos", "abs")},
    **{f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_float", "sym_int", "sym_sum")
    },
    "torch.sym_sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
    "builtins.round": round,
    "builtins.int": int,
    "builtins.float": float,
    "builtins.max": max,
    "builtins.min": min,
}
GETITEM = "operator.getitem"  # an item of what split and its like return
_FIXED: dict[str, Callable[..., Any]] = {
    **SIZES,
    GETITEM: operator.getitem,
    "simulate.fake_quantize": fake_quantize,  # layers with more bits than any kernel has
    "simulate.fake_quantize_weight": fake_quantize_weight,
    **{f"fxquant.{op}.default": getattr(torch.ops.fxquant, op).default for op in SCHEMAS},
}
_FIXED_NAMES: Mapping[Any, str] = {target: name for name, target in _FIXED.items()}


@functools.lru_cache(maxsize=4096)
def named(name: str) -> Callable[..., Any] | None:
    """The function that a saved graph calls by this name, None if there is none."""
    if name in _FIXED:
        return _FIXED[name]
    match = _NAME.fullmatch(name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    if not isinstance(packet, OpOverloadPacket) or match is None:
        return None
    overload = getattr(packet, match[2], None) if match[2] in packet.overloads() else None
    return overload if isinstance(overload, OpOverload) and not why_not(overload) else None


def why_not(target: Any) -> str:
    """Why a saved graph cannot call that, '' if it can."""
    if target in _FIXED_NAMES:
        return ""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return "is no operator of PyTorch's"
    name, schema = target._schema.name.removeprefix("aten::"), target._schema
    if schema.is_mutable or any(a.alias_info and a.alias_info.is_write for a in schema.arguments):
        return "writes into its arguments"
    if name.startswith("_") and name not in _UNDERSCORED:
        return "is internal to PyTorch"
    if _REFUSED.fullmatch(name):
        return "is not safe to run from a file"
    if torch.Tag.data_dependent_output in target.tags:
        return "makes a number of a tensor's values"
    if not all(_ARGUMENTS.fullmatch(str(a.type)) for a in schema.arguments):
        return "has arguments that are not plain"
    return "" if name in _SCALARS or _returns_tensors(schema) else "does not return tensors"


def _returns_tensors(schema: Any) -> bool:
    kinds = [str(value.type) for value in schema.returns]
    return bool(kinds) and set(kinds) <= {"Tensor", "List[Tensor]"}


def name_of(node: Node) -> str:
    """The saved name of what a node calls.

    Raises:
        ArtifactError: there is none, and why.
    """
    target = str(node.target)
    if node.op != "call_function":
        raise ArtifactError(f"node %{node.name} is a {node.op}, which the saved form does not have")
    if node.target in _FIXED_NAMES:
        return _FIXED_NAMES[node.target]
    if target in _WRITTEN:
        return _WRITTEN[target]
    reason = why_not(node.target)
    if reason:
        raise ArtifactError(f"node %{node.name} calls {target}, which {reason}")
    return target


def returns_lists(target: Any) -> bool:
    """Does it return as many tensors as its arguments say?"""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(str(r.type) == "List[Tensor]" for r in schema.returns)
