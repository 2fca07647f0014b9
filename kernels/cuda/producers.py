"""The ops that make quantised activations, on a GPU (producers.cu).

Each reads float32, float16 or bfloat16 once and writes int8; the norms write floats too. A tensor
that is not in its op's memory order is copied first, in its own dtype. The quantiser's scale and
zero point stay on the device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import OperandError
from fxquant.kernels import layout
from fxquant.kernels.config import Config
from fxquant.kernels.cuda import build, launch
from fxquant.kernels.layout import address

_ptr, _int, _i64, _f64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_STEP = (_ptr, _int, _int)  # row, index, bits
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "fxquant_quantize": (_ptr, _int, _i64, _i64, _ptr, _i64, *_STEP, _int, _ptr),
    "fxquant_add": (_ptr, _int, _ptr, _int, _i64, _ptr, *_STEP, _ptr),
    "fxquant_geglu": (_ptr, _int, _i64, _i64, _ptr, *_STEP, _int, _ptr),
    "fxquant_upsample": (_ptr, _int, _i64, _i64, _i64, _i64, _ptr, *_STEP, _ptr),
    "fxquant_group_norm": (
        _ptr, _int, _i64, _i64, _i64, _i64, _ptr, _ptr, _int, _f64, _int, _ptr, _int, *_STEP,
        _ptr, _i64, _ptr,
    ),
    "fxquant_layer_norm": (
        _ptr, _int, _i64, _i64, _ptr, _ptr, _int, _f64, _ptr, _int, *_STEP, _ptr,
    ),
    "fxquant_group_norm_workspace": (_i64, _i64, _i64, _i64),
}  # fmt: skip
_NORMS = ("group_norm_silu_quantize", "layer_norm_quantize")


def why_not(config: Config) -> str | None:
    """Why the CUDA producers cannot run ``config``."""
    if reason := build.why_not(config.machine.cuda):
        return reason
    if "producers" not in config.machine.cuda_kernels:
        return "the library `producers` is not built: build it with `fxquant kernels build`"
    for name in ("x", "xs", "a", "b"):
        if name in config.tensors and config.tensors[name].dtype not in launch.FLOATS:
            read = config.tensors[name].dtype
            return f"it reads float32, float16 and bfloat16, not {read}"
    if config.options["dtype"] not in _written(config.op):
        return f"it does not write {config.options['dtype']}"
    return None


def quantize(
    x: Tensor, row: Tensor, index: int, bits: int, activation: str, dtype: torch.dtype
) -> Tensor:
    """As `reference.quantize`."""
    _check("quantize", row, index, bits, dtype, x=x)
    out = layout.empty_image(x.shape, dtype, x.device)
    x = layout.in_order(x)
    _run(
        "fxquant_quantize", x.device, x.data_ptr(), launch.FLOATS[x.dtype], 1, x.numel(),
        out.data_ptr(), x.numel(), row.data_ptr(), index, bits, _activation(activation),
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
        raise OperandError(f"group norm is followed by none or silu, not {activation!r}")
    batch, channels = x.shape[:2]
    _check("group_norm_silu_quantize", row, index, bits, dtype, x=x, weight=weight, bias=bias)
    _check_sizes(channels, weight=weight, bias=bias)
    if groups < 1 or channels % groups:
        raise OperandError(f"{channels} channels do not make {groups} groups")
    out = layout.empty_channels_last(x.shape, dtype, x.device)
    x = x.movedim(1, -1).contiguous()
    weight, bias, parameters = _parameters(weight, bias)
    length = x.numel() // max(batch * channels, 1)
    sizes = (batch, length, channels, groups)
    # Freed with this call, and used again only by what is queued behind it on the same stream.
    workspace = torch.empty(_workspace(x.device, *sizes), dtype=torch.uint8, device=x.device)
    _run(
        "fxquant_group_norm", x.device, x.data_ptr(), launch.FLOATS[x.dtype], *sizes,
        address(weight), address(bias), parameters, eps, _activation(activation), out.data_ptr(),
        launch.TYPES[dtype], row.data_ptr(), index, bits, workspace.data_ptr(), workspace.numel(),
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
    width = x.shape[-1]
    _check("layer_norm_quantize", row, index, bits, dtype, x=x, weight=weight, bias=bias)
    _check_sizes(width, weight=weight, bias=bias)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    weight, bias, parameters = _parameters(weight, bias)
    _run(
        "fxquant_layer_norm", x.device, x.data_ptr(), launch.FLOATS[x.dtype],
        x.numel() // max(width, 1), width, address(weight), address(bias), parameters, eps,
        out.data_ptr(), launch.TYPES[dtype], row.data_ptr(), index, bits,
    )  # fmt: skip
    return out


def geglu_quantize(
    x: Tensor, row: Tensor, index: int, bits: int, approximate: str, dtype: torch.dtype
) -> Tensor:
    """As `reference.geglu_quantize`."""
    _check("geglu_quantize", row, index, bits, dtype, x=x)
    if x.shape[-1] % 2:
        raise OperandError(f"geglu takes an even last size, not {x.shape[-1]}")
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device)
    gelu = _activation({"none": "gelu", "tanh": "gelu_tanh"}.get(approximate, approximate))
    _run(
        "fxquant_geglu", x.device, x.data_ptr(), launch.FLOATS[x.dtype],
        out.numel() // max(width, 1), width, out.data_ptr(), row.data_ptr(), index, bits, gelu,
    )  # fmt: skip
    return out


def cat_quantize(
    xs: Sequence[Tensor], row: Tensor, index: int, bits: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.cat_quantize`: each tensor is written where it ends up."""
    _check("cat_quantize", row, index, bits, dtype, **{f"xs[{i}]": x for i, x in enumerate(xs)})
    dim %= xs[0].dim()
    shape = list(xs[0].shape)
    if any([*x.shape[:dim], *x.shape[dim + 1 :]] != shape[:dim] + shape[dim + 1 :] for x in xs):
        raise OperandError(f"cat_quantize takes shapes that are equal but for size {dim}")
    shape[dim] = sum(x.shape[dim] for x in xs)
    out = layout.empty_image(shape, dtype, xs[0].device)
    rows, stride = layout.rows(shape, dim)
    where = out.data_ptr()
    for part in xs:
        x = layout.in_order(part)
        columns = x.numel() // max(rows, 1)
        _run(
            "fxquant_quantize", x.device, x.data_ptr(), launch.FLOATS[x.dtype], rows, columns,
            where, stride, row.data_ptr(), index, bits, 0,
        )  # fmt: skip
        where += columns
    return out


def upsample_quantize(
    x: Tensor, row: Tensor, index: int, bits: int, factor: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.upsample_quantize`: each value is quantised once."""
    _check("upsample_quantize", row, index, bits, dtype, x=x)
    if x.dim() != 4 or factor < 1:
        raise OperandError(f"an image [B, C, H, W] is enlarged, not {x.shape} by {factor}")
    batch, channels, height, width = x.shape
    shape = (batch, channels, height * factor, width * factor)
    out = layout.empty_channels_last(shape, dtype, x.device)
    x = layout.in_order(x)
    _run(
        "fxquant_upsample", x.device, x.data_ptr(), launch.FLOATS[x.dtype], batch * height, width,
        channels, factor, out.data_ptr(), row.data_ptr(), index, bits,
    )  # fmt: skip
    return out


def add_quantize(
    a: Tensor, b: Tensor, row: Tensor, index: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.add_quantize`."""
    if a.shape != b.shape:
        raise OperandError(f"add_quantize takes equal shapes, not {a.shape} and {b.shape}")
    _check("add_quantize", row, index, bits, dtype, a=a, b=b)
    out = layout.empty_image(a.shape, dtype, a.device)
    a, b = layout.in_order(a), layout.in_order(b)
    _run(
        "fxquant_add", a.device, a.data_ptr(), launch.FLOATS[a.dtype], b.data_ptr(),
        launch.FLOATS[b.dtype], a.numel(), out.data_ptr(), row.data_ptr(), index, bits,
    )  # fmt: skip
    return out


@functools.cache
def library(device: torch.device) -> ctypes.CDLL:
    """The built producers for ``device``; raises KernelBuildError if they are not built."""
    loaded = build.library("producers", device)
    for function, arguments in _SIGNATURES.items():
        getattr(loaded, function).argtypes = arguments
    loaded.fxquant_group_norm_workspace.restype = _i64
    return loaded


def _run(function: str, device: torch.device, *arguments: object) -> None:
    launch.run(library(device), function, device, *arguments)


def _workspace(device: torch.device, *sizes: int) -> int:
    """Bytes that a group norm of the sizes (batch, length, channels, groups) takes."""
    bytes_: int = library(device).fxquant_group_norm_workspace(*sizes)
    if bytes_ < 0:
        raise OperandError(f"group norm does not take batch, length, channels, groups {sizes}")
    return bytes_


def _written(op: str) -> dict[torch.dtype, int]:
    return launch.TYPES if op in _NORMS else {torch.int8: launch.TYPES[torch.int8]}


def _check(
    op: str, row: Tensor, index: int, bits: int, dtype: torch.dtype, **tensors: Tensor | None
) -> None:
    """Raise OperandError for a device, dtype or quantiser that ``op`` cannot use."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    launch.check(next(iter(given.values())).device, **given, row=row)
    for name, tensor in given.items():
        if tensor.dtype not in launch.FLOATS and name not in ("weight", "bias"):
            raise OperandError(f"it reads float32, float16 and bfloat16; {name} is {tensor.dtype}")
    if dtype not in _written(op) or (dtype == torch.int8) != (index >= 0):
        raise OperandError(f"{op} with quantiser {index} does not write {dtype}")
    if index < 0:
        return
    launch.check_row(row, index)
    if not 2 <= bits <= 8:
        raise OperandError(f"integers have 2 to 8 bits, not {bits}")


def _check_sizes(size: int, **parameters: Tensor | None) -> None:
    for name, tensor in parameters.items():
        if tensor is not None and tensor.shape != (size,):
            raise OperandError(f"{name} has shape {tuple(tensor.shape)}, not ({size},)")


def _activation(name: str) -> int:
    if name not in launch.ACTIVATIONS:
        raise OperandError(f"activation {name!r} is not one of {', '.join(launch.ACTIVATIONS)}")
    return launch.ACTIVATIONS[name]


def _parameters(
    weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Weight and bias contiguous in one dtype that the kernels read, and its number."""
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    if dtype not in launch.FLOATS:
        dtype = torch.float32
    weight = None if weight is None else weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    return weight, bias, launch.FLOATS[dtype]
