"""Inputs that several kernel tests share, and how close results have to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.kernels import dispatch
from fxquant.kernels.int4 import pack_int4
from fxquant.kernels.machine import detect

PRODUCERS = (
    "quantize",
    "group_norm_silu_quantize",
    "layer_norm_quantize",
    "geglu_quantize",
    "cat_quantize",
    "upsample_quantize",
    "add_quantize",
)


def layer_kernels(bits: int = 8) -> list[str]:
    """The kernels of linear and conv2d, but for the reference, that can run on this machine."""
    here = detect()
    names = ["gemm"] if here.arch == "x86_64" and here.compiler else []
    names += ["onednn"] if here.arch == "x86_64" and here.has_vnni else []
    return [f"{name}_int4" for name in names] if bits <= 4 else names


def row(*steps: tuple[float, float]) -> Tensor:
    """Scales and zero points, by default of three ordinary quantisers."""
    return torch.tensor(steps or ((0.02, 3.0), (0.05, -7.0), (0.03, 0.0)))


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    """Uniform over all 256 values of int8 or uint8."""
    bytes_ = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return bytes_ if dtype == torch.uint8 else bytes_.view(torch.int8)


def nibbles(*shape: int, seed: int = 0) -> Tensor:
    """Int8 weights that fit four bits."""
    return integers(*shape, seed=seed) >> 4


def linear_args(
    *,
    batch: tuple[int, ...] = (2, 5),
    k: int = 24,
    n: int = 17,
    bits: int = 8,
    activation: str = "none",
    residual: torch.dtype | None = None,
    out: tuple[int, int, torch.dtype] = (-1, 8, torch.float32),
) -> tuple[Any, ...]:
    """Arguments of ``linear`` but for the kernel; ``out`` is its index, bits and dtype."""
    weight = integers(n, k, seed=1) if bits > 4 else pack_int4(nibbles(n, k, seed=1))
    return (
        integers(*batch, k, seed=2, dtype=torch.uint8),
        row(),
        0,
        weight,
        floats(n, seed=3).abs() * 0.02 + 0.001,
        floats(n, seed=4),
        bits,
        activation,
        None if residual is None else floats(*batch, n, seed=5, dtype=residual),
        *out,
    )


def conv2d_args(
    *,
    batch: int = 2,
    c: int = 11,
    n: int = 7,
    size: tuple[int, int] = (9, 6),
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    groups: int = 1,
    bits: int = 8,
    channel_add: Tensor | None = None,
    activation: str = "none",
    residual: torch.dtype | None = None,
    out: tuple[int, int, torch.dtype] = (-1, 8, torch.float32),
) -> tuple[Any, ...]:
    """Arguments of ``conv2d`` but for the kernel."""
    shape = (n, c // groups, kernel, kernel)
    reach = dilation * (kernel - 1) + 1
    height = (size[0] + padding[0] + padding[1] - reach) // stride + 1
    width = (size[1] + padding[2] + padding[3] - reach) // stride + 1
    return (
        integers(batch, c, *size, seed=2, dtype=torch.uint8),
        row(),
        0,
        integers(*shape, seed=1) if bits > 4 else pack_int4(nibbles(*shape, seed=1)),
        floats(n, seed=3).abs() * 0.02 + 0.001,
        floats(n, seed=4),
        bits,
        [kernel, kernel],
        [stride, stride],
        list(padding),
        [dilation, dilation],
        groups,
        channel_add,
        activation,
        None if residual is None else floats(batch, n, height, width, seed=5, dtype=residual),
        *out,
    )


def examples(op: str, dtype: torch.dtype = torch.float32) -> list[tuple[Any, ...]]:
    """A few calls of each op, without the kernel."""
    image, tokens, u8 = floats(2, 12, 5, 3, dtype=dtype), floats(2, 5, 18, dtype=dtype), torch.uint8
    weight, bias = floats(12, seed=7), floats(12, seed=8)
    affine = (floats(18, seed=7), floats(18, seed=8))
    return {
        "quantize": [
            (image, row(), 0, 8, "silu", u8),
            (tokens, row(), 1, 4, "gelu", torch.int8),
        ],
        "linear": [
            linear_args(activation="gelu"),
            linear_args(residual=torch.float32),
            linear_args(out=(1, 8, u8)),
        ],
        "conv2d": [
            conv2d_args(activation="silu", channel_add=floats(2, 7)),
            conv2d_args(stride=2, padding=(0, 1, 0, 1), residual=torch.float32),
            conv2d_args(kernel=1, padding=(0, 0, 0, 0), out=(1, 8, u8)),
        ],
        "group_norm_silu_quantize": [
            (image, row(), 0, 8, weight, bias, 4, 1e-5, "silu", u8),
            (floats(2, 12, 7), row(), -1, 8, None, None, 3, 1e-6, "none", torch.float32),
        ],
        "layer_norm_quantize": [
            (tokens, row(), 0, 8, *affine, 1e-5, u8),
            (tokens, row(), -1, 8, None, None, 1e-5, torch.bfloat16),
        ],
        "geglu_quantize": [
            (tokens, row(), 0, 8, "none", u8),
            (tokens, row(), 0, 8, "tanh", torch.int8),
        ],
        "cat_quantize": [
            ([image, floats(2, 5, 5, 3, seed=9, dtype=dtype)], row(), 0, 8, 1, u8),
            ([tokens, tokens], row(), 0, 8, -1, u8),
            ([image, image, image], row(), 0, 8, 0, u8),
        ],
        "upsample_quantize": [(image, row(), 0, 8, 2, u8)],
        "add_quantize": [(image, floats(2, 12, 5, 3, seed=9), row(), 0, 8, u8)],
        "attention": [
            _attention(None, 0.2),
            _attention(floats(1, 1, 5, 6), None),
        ],
    }[op]


def _attention(mask: Tensor | None, scale: float | None) -> tuple[Any, ...]:
    q, k, v = (floats(2, 3, tokens, 8, seed=tokens) for tokens in (5, 6, 6))
    return q, k, v, row(), -1, -1, -1, mask, scale, -1, 8, q.dtype


def call(op: str, kernel: str, *args: Any) -> Tensor:
    """The result of one kernel, called directly."""
    return dispatch.run(op, kernel)(*args)


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Floats within ``relative`` (bfloat16: within two roundings), integers within 1 LSB."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.dtype in (torch.uint8, torch.int8):
        difference = (actual.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() <= 0.02
        return
    if expected.dtype == torch.bfloat16:
        relative = 2.0**-7
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=relative, atol=relative * scale
    )
