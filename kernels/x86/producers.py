"""The ops that make quantised activations, fused in our own C++ (producers.cpp).

Each reads float32 or bfloat16 once and writes integers; the norms write floats too. The library
is compiled at the first call. A tensor that is not in its op's memory order is copied first, in
its own dtype.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.kernels import calls, layout
from fxquant.kernels.config import Config
from fxquant.kernels.layout import address, float32
from fxquant.kernels.x86 import build
from fxquant.kernels.x86.arguments import ACTIVATIONS, FLOATS, TYPES, step

_ABI_VERSION = 1

_ptr, _int, _i64, _f64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "fxquant_quantize": (_ptr, _int, _i64, _i64, _ptr, _int, _i64, _ptr, _int, _int, _int),
    "fxquant_add": (_ptr, _int, _ptr, _int, _i64, _ptr, _int, _ptr, _int, _int),
    "fxquant_geglu": (_ptr, _int, _i64, _i64, _ptr, _int, _ptr, _int, _int, _int),
    "fxquant_upsample": (_ptr, _int, _i64, _i64, _i64, _i64, _ptr, _int, _ptr, _int, _int),
    "fxquant_group_norm": (
        _ptr, _int, _i64, _i64, _i64, _i64, _ptr, _ptr, _f64, _int, _ptr, _int, _ptr, _int, _int,
    ),
    "fxquant_layer_norm": (
        _ptr, _int, _i64, _i64, _ptr, _ptr, _f64, _ptr, _int, _ptr, _int, _int,
    ),
}  # fmt: skip


def why_not(config: Config) -> str | None:
    """Why the fused kernels cannot run ``config``."""
    if reason := build.why_not(config.machine):
        return reason
    activations = [config.tensors[name] for name in ("x", "xs", "a", "b") if name in config.tensors]
    for info in activations:
        if info.dtype not in FLOATS:
            return f"it reads float32 and bfloat16, not {info.dtype}"
    if config.options["dtype"] not in TYPES:
        return f"it does not write {config.options['dtype']}"
    return None


def quantize(
    x: Tensor, row: Tensor, index: int, bits: int, activation: str, dtype: torch.dtype
) -> Tensor:
    """As `reference.quantize`."""
    out = layout.empty_image(x.shape, dtype, x.device)
    x = layout.in_order(x)
    calls.call(
        library().fxquant_quantize,
        x.data_ptr(), _type(x), 1, x.numel(), out.data_ptr(), TYPES[dtype], 0,
        step(row, index), bits, ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return out


def group_norm_silu_quantize(
    x: Tensor,
    row: Tensor,
    index: int,
    bits: int,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.group_norm_silu_quantize`."""
    if activation not in ("none", "silu"):
        raise ValueError(f"group norm is followed by none or silu, not {activation!r}")
    batch, channels = x.shape[:2]
    out = layout.empty_channels_last(x.shape, dtype, x.device)
    x = x.movedim(1, -1).contiguous()
    weight, bias = float32(weight), float32(bias)
    calls.call(
        library().fxquant_group_norm,
        x.data_ptr(), _type(x), batch, math.prod(x.shape[1:-1]), channels, groups,
        address(weight), address(bias), eps, ACTIVATIONS[activation],
        out.data_ptr(), TYPES[dtype], step(row, index), bits, torch.get_num_threads(),
    )  # fmt: skip
    return out


def layer_norm_quantize(
    x: Tensor,
    row: Tensor,
    index: int,
    bits: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.layer_norm_quantize`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    width = x.shape[-1]
    weight, bias = float32(weight), float32(bias)
    calls.call(
        library().fxquant_layer_norm,
        x.data_ptr(), _type(x), math.prod(x.shape[:-1]), width, address(weight), address(bias), eps,
        out.data_ptr(), TYPES[dtype], step(row, index), bits, torch.get_num_threads(),
    )  # fmt: skip
    return out


def geglu_quantize(
    x: Tensor, row: Tensor, index: int, bits: int, approximate: str, dtype: torch.dtype
) -> Tensor:
    """As `reference.geglu_quantize`."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=dtype)
    gelu = ACTIVATIONS["gelu_tanh" if approximate == "tanh" else "gelu"]
    calls.call(
        library().fxquant_geglu,
        x.data_ptr(), _type(x), math.prod(x.shape[:-1]), width, out.data_ptr(), TYPES[dtype],
        step(row, index), bits, gelu, torch.get_num_threads(),
    )  # fmt: skip
    return out


def cat_quantize(
    xs: Sequence[Tensor], row: Tensor, index: int, bits: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.cat_quantize`: each tensor is written where it ends up."""
    dim %= xs[0].dim()
    shape = list(xs[0].shape)
    shape[dim] = sum(x.shape[dim] for x in xs)
    out = layout.empty_image(shape, dtype, xs[0].device)
    rows, stride = layout.rows(shape, dim)
    where = out.data_ptr()
    for part in xs:
        x = layout.in_order(part)
        columns = x.numel() // max(rows, 1)
        calls.call(
            library().fxquant_quantize,
            x.data_ptr(), _type(x), rows, columns, where, TYPES[dtype], stride,
            step(row, index), bits, 0, torch.get_num_threads(),
        )  # fmt: skip
        where += columns
    return out


def upsample_quantize(
    x: Tensor, row: Tensor, index: int, bits: int, factor: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.upsample_quantize`: each value is quantised once."""
    batch, channels, height, width = x.shape
    shape = (batch, channels, height * factor, width * factor)
    out = layout.empty_channels_last(shape, dtype, x.device)
    x = layout.in_order(x)
    calls.call(
        library().fxquant_upsample,
        x.data_ptr(), _type(x), batch * height, width, channels, factor, out.data_ptr(),
        TYPES[dtype], step(row, index), bits, torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_quantize(
    a: Tensor, b: Tensor, row: Tensor, index: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.add_quantize`."""
    if a.shape != b.shape:
        raise ValueError(f"add_quantize takes equal shapes, not {a.shape} and {b.shape}")
    out = layout.empty_image(a.shape, dtype, a.device)
    a, b = layout.in_order(a), layout.in_order(b)
    calls.call(
        library().fxquant_add,
        a.data_ptr(), _type(a), b.data_ptr(), _type(b), a.numel(), out.data_ptr(), TYPES[dtype],
        step(row, index), bits, torch.get_num_threads(),
    )  # fmt: skip
    return out


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled producers; compiles them if they are not cached on disk."""
    return build.library("producers", _SIGNATURES, _ABI_VERSION)


def _type(x: Tensor) -> int:
    if x.dtype not in FLOATS:
        raise ValueError(f"the fused kernels read float32 and bfloat16, not {x.dtype}")
    return FLOATS[x.dtype]
