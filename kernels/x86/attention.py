"""Attention without the score matrix, in our own C++ (attention.cpp): bfloat16, float32 or int8.

Float tensors are multiplied in their own dtype and summed in float32; the weights of bfloat16
values are rounded to bfloat16. Integers (uint8, q + 128) are multiplied as integers; their weights
have eight bits of the largest one of a block of keys. Softmax itself is float32 in all cases.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fxquant.kernels import calls, layout
from fxquant.kernels.config import Config
from fxquant.kernels.x86 import build
from fxquant.kernels.x86.arguments import TYPES, step

_ABI_VERSION = 1
_LOWEST = -1e30
_OPERANDS = ("q", "k", "v")

_ptr, _i32, _i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Strided(ctypes.Structure):
    """`Tensor` of attention.cpp."""

    _fields_ = (("data", _ptr), ("batch", _i64), ("head", _i64), ("token", _i64))


class _Call(ctypes.Structure):
    """`Call` of attention.cpp."""

    _fields_ = (
        *((name, _Strided) for name in ("q", "k", "v", "mask", "out")),
        *((n, _i64) for n in ("batch", "heads", "queries", "keys", "channels", "value_channels")),
        ("scale", ctypes.c_float),
        *((name, _ptr) for name in ("q_step", "k_step", "v_step", "out_step")),
        *((name, _i32) for name in ("in_type", "out_type", "out_bits", "threads")),
    )


def why_not(config: Config) -> str | None:
    """Why the fused kernel cannot run ``config``."""
    if reason := build.why_not(config.machine):
        return reason
    dtypes = {config.tensors[name].dtype for name in _OPERANDS}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.uint8}:
        found = ", ".join(str(config.tensors[name].dtype) for name in _OPERANDS)
        return f"it reads float32, bfloat16 or uint8, all of one dtype, not {found}"
    if any(len(config.tensors[name].shape) != 4 for name in _OPERANDS):
        return "it takes [batch, heads, tokens, channels]"
    if config.options["out_dtype"] not in TYPES:
        return f"it does not write {config.options['out_dtype']}"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    q_index: int,
    k_index: int,
    v_index: int,
    mask: Tensor | None,
    scale: float | None,
    out_index: int,
    out_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `reference.attention`; integers are uint8."""
    batch, heads, queries, channels = q.shape
    keys, value_channels = v.shape[2:]
    out = layout.empty_heads((batch, heads, queries, value_channels), out_dtype, q.device)
    if out.numel() == 0:
        return out
    if k.shape[2:] != (keys, channels):
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    q, k, v = (_rows(x.expand(batch, heads, *x.shape[2:])) for x in (q, k, v))
    mask = None if mask is None else _added(mask, keys).expand(batch, heads, queries, keys)
    call = _Call(
        _strided(q), _strided(k), _strided(v), _strided(mask), _strided(out),
        batch, heads, queries, keys, channels, value_channels,
        channels**-0.5 if scale is None else scale,
        *(step(row, index) for index in (q_index, k_index, v_index, out_index)),
        TYPES[q.dtype], TYPES[out_dtype], out_bits, torch.get_num_threads(),
    )  # fmt: skip
    calls.call(library().fxquant_attention, ctypes.byref(call))
    return out


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel; compiles it if it is not cached on disk."""
    return build.library("attention", {"fxquant_attention": (_ptr,)}, _ABI_VERSION)


def _rows(x: Tensor) -> Tensor:
    """``x`` with each token's channels next to each other."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _added(mask: Tensor, keys: int) -> Tensor:
    """What is added to the scores: float32, the keys of a query next to each other.

    Finite numbers stay so when they are scaled to powers of two.
    """
    if mask.dtype == torch.bool:
        nothing = torch.zeros(mask.shape, device=mask.device)
        mask = nothing.masked_fill_(~mask, float("-inf"))
    mask = mask.float()
    mask = mask.clamp(min=_LOWEST).masked_fill(mask == float("-inf"), float("-inf"))
    return mask.expand(*mask.shape[:-1], keys).contiguous()


def _strided(x: Tensor | None) -> _Strided:
    return _Strided() if x is None else _Strided(x.data_ptr(), *x.stride()[:3])
