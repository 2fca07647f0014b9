"""What a CUTLASS library is told of a call's tensors, and which tensors are refused before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import OperandError
from fxquant.kernels import reference
from fxquant.kernels.cuda import call, launch
from fxquant.kernels.layout import address, float32


def check(
    x: Tensor,
    row: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    indices: tuple[int, int],
    activation: str,
    out_dtype: torch.dtype,
    others: dict[str, Tensor | None],
) -> None:
    """Everything that a kernel could not report, before it is launched."""
    launch.check(x.device, row=row, weight=weight, weight_scale=weight_scale, **others)
    if x.dtype != torch.int8:
        raise OperandError(f"activations are int8 on a GPU, not {x.dtype}")
    for name, tensor in (("weight_scale", weight_scale), ("bias", others["bias"])):
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise OperandError(f"{name} is {list(tensor.shape)}, the weight {list(weight.shape)}")
    if activation not in launch.ACTIVATIONS | reference.GATED.keys():
        raise OperandError(f"there is no activation {activation!r}")
    for index in indices[: 1 if indices[1] < 0 else 2]:
        launch.check_row(row, index)
    if out_dtype not in launch.TYPES or (out_dtype == torch.int8) != (indices[1] >= 0):
        raise OperandError(f"quantiser {indices[1]} does not write {out_dtype}")


def check_weight(weight: Tensor, bits: int, k: int) -> None:
    """``k`` weights of so many bits for each output channel."""
    dtype, size = (torch.int8, k) if bits > 4 else (torch.uint8, (k + 1) // 2)
    if weight.dtype != dtype or weight.numel() != weight.shape[0] * size:
        raise OperandError(
            f"{k} weights per channel take {dtype} [N, {size}], "
            f"not {weight.dtype} {list(weight.shape)}"
        )


def expanded(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if tensor.dim() != len(shape) or any(
        a not in (1, b) for a, b in zip(tensor.shape, shape, strict=True)
    ):
        raise OperandError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    return tensor.expand(*shape)


def epilogue(
    row: Tensor,
    x_index: int,
    weight_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    channel_add: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
    out_index: int,
    out_bits: int,
) -> call.Epilogue:
    """``residual`` and ``out`` are of one shape, in memory order."""
    if residual is not None:
        residual = residual if residual.dtype in launch.TYPES else residual.float()
        residual = expanded("residual", residual, out.shape).contiguous()
    kept = [float32(tensor) for tensor in (weight_scale, bias, channel_add)]
    end = call.Epilogue(
        row=row.data_ptr(), weight_scale=address(kept[0]), weight_sums=sums.data_ptr(),
        tap_sums=sums[1:].data_ptr(), bias=address(kept[1]), channel_add=address(kept[2]),
        residual=address(residual), out=out.data_ptr(), x_index=x_index, out_index=out_index,
        out_bits=out_bits, activation=launch.ACTIVATIONS[activation],
        residual_type=0 if residual is None else launch.TYPES[residual.dtype],
        out_type=launch.TYPES[out.dtype],
    )  # fmt: skip
    end.alive = (*kept, residual)  # the caller launches before it lets go of the struct
    return end
