"""Four-bit integers on a GPU (weights.cu): weights to bytes, activations to nibbles."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import OperandError
from fxquant.kernels.config import Config
from fxquant.kernels.cuda import build, launch

_ptr, _i64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "fxquant_unpack_linear": (_ptr, _i64, _i64, _i64, _ptr, _ptr),
    "fxquant_unpack_conv": (_ptr, _i64, _i64, _i64, _i64, _ptr, _ptr),
    "fxquant_pack_int4": (_ptr, _i64, _i64, _i64, _ptr, _ptr),
}


def why_not(config: Config) -> str | None:
    """Why the CUDA kernels cannot unpack the weight of ``config``."""
    if reason := build.why_not(config.machine.cuda):
        return reason
    if "weights" not in config.machine.cuda_kernels:
        return "the library `weights` is not built: build it with `fxquant kernels build`"
    return None


def unpack_linear(packed: Tensor, k: int, columns: int, out: Tensor | None = None) -> Tensor:
    """uint8 ``[N, ceil(k / 2)]`` -> int8 ``[N, columns]``, zeros from ``k`` on.

    ``out``, if given, is such a contiguous tensor, which is written and returned. Raises
    OperandError for a dtype, device, stride or size that does not fit.
    """
    _check_packed(packed, k)
    if columns < k:
        raise OperandError(f"{k} weights per channel do not fit {columns} columns")
    out = _made(out, (packed.shape[0], columns), torch.int8, packed.device)
    _run(
        "fxquant_unpack_linear", packed.device, packed.data_ptr(), packed.shape[0], k, columns,
        out.data_ptr(),
    )  # fmt: skip
    return out


def unpack_conv(
    packed: Tensor, channels: int, kernel_size: Sequence[int], columns: int,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """uint8 ``[N, ceil(channels * R * S / 2)]`` -> int8 ``[N, R, S, columns]``.

    The nibbles of an output channel are in the order (channel, R, S); channels from ``channels``
    on are zeros. ``out`` and errors are as in `unpack_linear`.
    """
    taps = kernel_size[0] * kernel_size[1]
    _check_packed(packed, channels * taps)
    if columns < channels:
        raise OperandError(f"{channels} channels do not fit {columns} columns")
    out = _made(out, (packed.shape[0], *kernel_size, columns), torch.int8, packed.device)
    _run(
        "fxquant_unpack_conv", packed.device, packed.data_ptr(), packed.shape[0], channels, taps,
        columns, out.data_ptr(),
    )  # fmt: skip
    return out


def pack_int4(x: Tensor, columns: int, out: Tensor | None = None) -> Tensor:
    """int8 ``[..., K]`` in [-8, 7] -> uint8 ``[..., columns / 2]``, zeros from ``K`` on.

    ``columns`` is even. ``out`` and errors are as in `unpack_linear`.
    """
    launch.check(x.device, x=x)
    if x.dtype != torch.int8 or not x.is_contiguous():
        raise OperandError(f"pack_int4 takes contiguous int8, not {x.dtype} strided {x.stride()}")
    k = x.shape[-1]
    if columns < k or columns % 2:
        raise OperandError(f"{k} integers do not fit {columns} columns, an even number")
    out = _made(out, (*x.shape[:-1], columns // 2), torch.uint8, x.device)
    rows = x.numel() // max(k, 1)
    _run("fxquant_pack_int4", x.device, x.data_ptr(), rows, k, columns, out.data_ptr())
    return out


@functools.cache
def library(device: torch.device) -> ctypes.CDLL:
    """The built library for ``device``; raises KernelBuildError if it is not built."""
    loaded = build.library("weights", device)
    for function, arguments in _SIGNATURES.items():
        getattr(loaded, function).argtypes = arguments
    return loaded


def _run(function: str, device: torch.device, *arguments: object) -> None:
    launch.run(library(device), function, device, *arguments)


def _check_packed(packed: Tensor, k: int) -> None:
    launch.check(packed.device, packed=packed)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != (k + 1) // 2:
        raise OperandError(
            f"{k} four-bit weights per channel take uint8 [N, {(k + 1) // 2}], "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    if not packed.is_contiguous():
        raise OperandError("four-bit weights are contiguous")


def _made(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``out`` if it fits, or an empty tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise OperandError(f"out must be a contiguous {dtype} {list(shape)} on {device}")
    return out
