"""Linear and conv2d in our own integer kernels (gemm.cpp), exact at every level of x86.

Weights are repacked at their first use. Four-bit weights stay packed two to a byte, and are
unpacked a panel at a time into cache. Everything that follows the sums is done on each tile of
them: scales, bias, an activation or GEGLU, a residual, and the rounding to integers or bfloat16.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels import calls, layout
from fxquant.kernels.config import MOST_PRODUCTS, Config
from fxquant.kernels.layout import address, float32
from fxquant.kernels.pack import Packed, packed
from fxquant.kernels.x86 import build, onednn
from fxquant.kernels.x86.arguments import ACTIVATIONS, FLOATS, TYPES, step

_ABI_VERSION = 2
_GATED = {"geglu": 4, "geglu_tanh": 5}

_ptr, _int, _i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "fxquant_gemm_sizes": (_i64, _i64, _i64, _int, _int, _ptr),
    "fxquant_gemm_pack": (_ptr, _i64, _i64, _i64, _int, _int, _ptr, _ptr, _int),
    "fxquant_gemm_run": (
        _ptr, _ptr, _ptr, _ptr, _int, _ptr, _ptr, _ptr, _ptr, _int, _ptr, _int, _ptr, _int, _ptr,
        _int, _int,
    ),
}  # fmt: skip


def why_not(config: Config) -> str | None:
    """Why int8 weights cannot, or should not, run here."""
    if not 5 <= config.options["weight_bits"] <= 8:
        return f"its weights have 5 to 8 bits, not {config.options['weight_bits']}"
    reason = _why_not(config)
    if reason is None and "amx_int8" in config.machine.cpu_features:
        return None if onednn.why_not(config) else "the CPU has AMX, which oneDNN uses"
    return reason


def why_not_int4(config: Config) -> str | None:
    """Why packed four-bit weights cannot run here."""
    if not 2 <= config.options["weight_bits"] <= 4:
        return f"its weights have 2 to 4 bits, not {config.options['weight_bits']}"
    return _why_not(config)


def _why_not(config: Config) -> str | None:
    if reason := build.why_not(config.machine):
        return reason
    if config.tensors["x"].dtype != torch.uint8:
        return f"its activations are stored as uint8, not {config.tensors['x'].dtype}"
    if config.options.get("groups", 1) != 1:
        return f"it has no grouped convolution ({config.options['groups']} groups)"
    if config.products > MOST_PRODUCTS:
        return f"int32 holds the sum of {MOST_PRODUCTS} products"
    if config.options.get("out_dtype", torch.float32) not in TYPES:
        return f"it does not write {config.options['out_dtype']}"
    return None


def prepare_linear(
    weight: Tensor, weight_bits: int, in_features: int, activation: str = "none"
) -> Packed:
    """Pack a linear's weight now instead of at its first use."""
    return _prepare(weight, weight_bits, in_features, 1, activation in _GATED)


def prepare_conv2d(
    weight: Tensor, weight_bits: int, in_channels: int, kernel_size: Sequence[int]
) -> Packed:
    """Pack a convolution's weight now instead of at its first use."""
    return _prepare(weight, weight_bits, in_channels, kernel_size[0] * kernel_size[1], False)


def linear(
    x: Tensor,
    row: Tensor,
    x_index: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation: str,
    residual: Tensor | None,
    out_index: int,
    out_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `reference.linear`, on uint8 ``x``."""
    pack = prepare_linear(weight, weight_bits, x.shape[-1], activation)
    if activation in _GATED and (residual is not None or weight.shape[0] % 2):
        raise ValueError(f"{activation} takes no residual, and an even number of channels")
    columns = weight.shape[0] // (2 if activation in _GATED else 1)
    out = torch.empty((*x.shape[:-1], columns), dtype=out_dtype, device=x.device)
    rows = out.numel() // max(columns, 1)
    geometry = (1, 1, rows, x.shape[-1], weight.shape[0], 1, 1, 1, 1, 0, 0, 1, 1, 1, rows)
    residual = _residual(residual, out)
    _run(
        geometry, x.contiguous(), row, x_index, pack, weight_bits, weight_scale, bias, None,
        (ACTIVATIONS | _GATED)[activation], residual, out, out_index, out_bits,
    )  # fmt: skip
    return out


def conv2d(
    x: Tensor,
    row: Tensor,
    x_index: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channel_add: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_index: int,
    out_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `reference.conv2d`, on uint8 ``x`` and with ``groups`` 1."""
    if groups != 1:
        raise ValueError(f"grouped convolution ({groups} groups) is not for this kernel")
    batch, channels, height, width = x.shape
    outputs = weight.shape[0]
    pack = prepare_conv2d(weight, weight_bits, channels, kernel_size)
    out_size = layout.convolved((height, width), kernel_size, stride, padding, dilation)
    out = layout.empty_image((batch, outputs, *out_size), out_dtype, x.device)
    top, _, left, _ = padding
    geometry = (
        batch, height, width, channels, outputs, *kernel_size, *stride, top, left, *dilation,
        *out_size,
    )  # fmt: skip
    if residual is not None:
        residual = _residual(residual.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1))
    if channel_add is not None:
        channel_add = float32(channel_add.expand(batch, outputs))
    _run(
        geometry, x.permute(0, 2, 3, 1).contiguous(), row, x_index, pack, weight_bits,
        weight_scale, bias, channel_add, ACTIVATIONS[activation], residual, out, out_index,
        out_bits,
    )  # fmt: skip
    return out


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; compiles them if they are not cached on disk."""
    return build.library("gemm", _SIGNATURES, _ABI_VERSION)


def _prepare(weight: Tensor, bits: int, channels: int, taps: int, gated: bool) -> Packed:
    four_bit = bits <= 4
    shape = (weight.shape[0], channels, taps, gated, four_bit)

    def make() -> Packed:
        sizes = (ctypes.c_int64 * 2)()
        library().fxquant_gemm_sizes(*shape, sizes)
        panels = torch.empty(sizes[0], dtype=torch.uint8, device=weight.device)
        sums = torch.empty(sizes[1], dtype=torch.int32, device=weight.device)
        natural = _checked(weight, channels * taps, four_bit).contiguous()
        library().fxquant_gemm_pack(
            natural.data_ptr(), *shape, panels.data_ptr(), sums.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return Packed(panels, sums)

    # Tests load libraries of several levels, whose panels differ, into one process.
    return packed(weight, make, ("gemm", id(library()), *shape))


def _checked(weight: Tensor, k: int, four_bit: bool) -> Tensor:
    """``weight``, found to hold ``k`` weights per output channel: C++ would read past its end."""
    if not 0 < k <= MOST_PRODUCTS:
        raise ValueError(f"{k} products are summed, int32 holds those of 1 to {MOST_PRODUCTS}")
    dtype, size = (torch.uint8, (k + 1) // 2) if four_bit else (torch.int8, k)
    if weight.dtype != dtype or weight[0].numel() != size:
        raise ValueError(
            f"{k} weights per channel take {dtype} [N, {size}], "
            f"not {weight.dtype} {list(weight.shape)}"
        )
    return weight


def _run(
    geometry: Sequence[int],
    x: Tensor,
    row: Tensor,
    x_index: int,
    pack: Packed,
    weight_bits: int,
    weight_scale: Tensor,
    bias: Tensor | None,
    channel_add: Tensor | None,
    activation: int,
    residual: Tensor | None,
    out: Tensor,
    out_index: int,
    out_bits: int,
) -> None:
    """Call the C++; ``x`` and ``residual`` are in memory order."""
    if x.dtype != torch.uint8 or out.dtype not in TYPES:
        raise ValueError(f"the kernels take uint8 and write no float16: {x.dtype}, {out.dtype}")
    x = F.pad(x, (0, -x.shape[-1] % 4)) if x.shape[-1] % 4 else x
    scale, bias = float32(weight_scale), float32(bias)
    calls.call(
        library().fxquant_gemm_run,
        (ctypes.c_int64 * len(geometry))(*geometry), x.data_ptr(), step(row, x_index),
        pack.weight.data_ptr(), weight_bits <= 4, pack.sums.data_ptr(), address(scale),
        address(bias), address(channel_add), activation, address(residual),
        0 if residual is None else FLOATS[residual.dtype], out.data_ptr(), TYPES[out.dtype],
        step(row, out_index), out_bits, torch.get_num_threads(),
    )  # fmt: skip


def _residual(residual: Tensor | None, out: Tensor) -> Tensor | None:
    """The residual in the memory order of ``out``, in a dtype that C++ reads."""
    if residual is None:
        return None
    residual = residual if residual.dtype in FLOATS else residual.float()
    return residual.expand(out.shape).contiguous()
