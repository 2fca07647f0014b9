"""Four-bit integers on a GPU (weights.cu): weights to bytes, activations to nibbles."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import OperandError
from fxquant.kernels.cuda import build, launch

_ptr, _i64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "fxquant_unpack_conv": (_ptr, _i64, _i64, _i64, _i64, _ptr, _ptr),
    "fxquant_pack_int4": (_ptr, _i64, _i64, _i64, _ptr, _ptr),
}


def unpack_conv(packed: Tensor, channels: int, kernel_size: Sequence[int], columns: int) -> Tensor:
    """uint8 ``[N, ceil(channels * R * S / 2)]`` -> int8 ``[N, R, S, columns]``.

    The nibbles of an output channel are in the order (channel, R, S); channels from ``channels``
    on are zeros. A linear's weight has one tap. Raises OperandError for a dtype, device, stride or
    size that does not fit.
    """
    taps = kernel_size[0] * kernel_size[1]
    _check_packed(packed, channels * taps)
    if columns < channels:
        raise OperandError(f"{channels} channels do not fit {columns} columns")
    shape = (packed.shape[0], *kernel_size, columns)
    out = torch.empty(shape, dtype=torch.int8, device=packed.device)
    _run(
        "fxquant_unpack_conv", packed.device, packed.data_ptr(), packed.shape[0], channels, taps,
        columns, out.data_ptr(),
    )  # fmt: skip
    return out


def pack_int4(x: Tensor, columns: int) -> Tensor:
    """int8 ``[..., K]`` in [-8, 7] -> uint8 ``[..., columns / 2]``, zeros from ``K`` on.

    ``columns`` is even. Raises OperandError as `unpack_conv` does.
    """
    launch.check(x.device, x=x)
    if x.dtype != torch.int8 or not x.is_contiguous():
        raise OperandError(f"pack_int4 takes contiguous int8, not {x.dtype} strided {x.stride()}")
    k = x.shape[-1]
    if columns < k or columns % 2:
        raise OperandError(f"{k} integers do not fit {columns} columns, an even number")
    out = torch.empty((*x.shape[:-1], columns // 2), dtype=torch.uint8, device=x.device)
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
