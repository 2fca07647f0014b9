"""Calls of linear and conv2d for the GPU tests: made on the CPU, as the reference takes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels import reference
from fxquant.kernels.cutlass import gemm
from fxquant.kernels.cutlass.tiles import Tile
from fxquant.kernels.int4 import pack_int4
from tests.kernels import cases

OUTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8}
ROW = cases.row((0.02, 3.0), (0.05, -7.0), (0.03, 0.0), (0.01, -128.0), (0.02, 127.0))


@dataclass(frozen=True)
class Gemm:
    """Sizes of a linear."""

    m: int
    n: int
    k: int

    def weight_shape(self) -> tuple[int, ...]:
        return self.n, self.k

    def x_shape(self) -> tuple[int, ...]:
        return self.m, self.k

    def out_shape(self) -> tuple[int, ...]:
        return self.m, self.n

    @property
    def products(self) -> int:
        return self.k


@dataclass(frozen=True)
class Window:
    """Sizes of a convolution; padding is (top, bottom, left, right)."""

    batch: int
    channels: int
    n: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)

    def weight_shape(self) -> tuple[int, ...]:
        return self.n, self.channels, *self.kernel

    def x_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, *self.size

    def out_shape(self) -> tuple[int, ...]:
        pads = (self.padding[0] + self.padding[1], self.padding[2] + self.padding[3])
        axes = zip(self.size, pads, self.dilation, self.kernel, self.stride, strict=True)
        return self.batch, self.n, *((s + p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in axes)

    @property
    def products(self) -> int:
        return self.channels * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Case:
    """One call: everything but the tensors' values, which depend on the sizes alone."""

    shape: Gemm | Window
    bits: int = 8
    x_bits: int = 8
    x_index: int = 0
    bias: bool = True
    channel_add: bool = False
    activation: str = "none"
    residual: torch.dtype | None = None
    out: str = "f16"
    out_bits: int = 8
    unit: bool = False
    """All scales are one, so that sums come out as they are."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """Arguments to take instead of those made here."""

    @property
    def op(self) -> str:
        return "linear" if isinstance(self.shape, Gemm) else "conv2d"

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def arguments(self) -> dict[str, Any]:
        """The op's arguments but for the kernel, on the CPU."""
        shape, n = self.shape, self.shape.n
        made = {
            "x": _integers(shape.x_shape(), self.x_bits, seed=2),
            "row": self.row(),
            "x_index": self.x_index,
            "weight": self.weight(),
            "weight_scale": torch.ones(n) if self.unit else self.scale(),
            "bias": cases.floats(n, seed=4) if self.bias else None,
            "weight_bits": self.bits,
            **self.window(),
            "activation": self.activation,
            "residual": None,
            "out_index": 1 if self.out == "s8" else -1,
            "out_bits": self.out_bits,
            "out_dtype": OUTS[self.out],
        }
        if self.residual is not None:
            made["residual"] = cases.floats(*shape.out_shape(), seed=5, dtype=self.residual)
        return made | self.given

    def row(self) -> Tensor:
        return torch.stack([torch.ones(5), ROW[:, 1]], 1) if self.unit else ROW.clone()

    def weight(self) -> Tensor:
        weight = _integers(self.shape.weight_shape(), min(self.bits, 8), seed=1)
        return pack_int4(weight) if self.bits <= 4 else weight

    def scale(self) -> Tensor:
        """Of such a size that results are about one, whatever is summed."""
        typical = 0.3 * 2.0 ** (self.x_bits + self.bits - 2) * self.shape.products**0.5
        scale = (0.5 + cases.floats(self.shape.n, seed=3).abs()) / typical
        return scale / ROW[self.x_index, 0]

    def window(self) -> dict[str, Any]:
        shape = self.shape
        if isinstance(shape, Gemm):
            return {}
        return {
            "kernel_size": list(shape.kernel), "stride": list(shape.stride),
            "padding": list(shape.padding), "dilation": list(shape.dilation), "groups": 1,
            "channel_add": cases.floats(shape.batch, shape.n, seed=6) if self.channel_add else None,
        }  # fmt: skip


def products_of(tile: Tile) -> gemm.Products:
    return {"s8": gemm.INT8, "s8s4": gemm.INT4, "s4": gemm.W4A4}[tile.types]


def expected(case: Case) -> Tensor:
    """The reference's result, on the CPU."""
    result: Tensor = getattr(reference, case.op)(**case.arguments())
    return result


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a placed graph has them: images and int8 weights channels last."""
    return {n: _placed(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}


def _placed(tensor: Tensor) -> Tensor:
    order = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.cuda().contiguous(memory_format=order)


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Bit for bit, dtype and strides included."""
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    assert actual.stride() == wanted.stride()
    difference = (actual.cpu().float() - wanted.float()).abs()
    wrong = int((difference != 0).sum())
    assert not wrong, f"{wrong} of {wanted.numel()} differ, by up to {difference.max():.3g}"


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    """Integers within 1, floats within two roundings of their dtype and 1e-5."""
    assert actual.dtype == wanted.dtype
    assert actual.stride() == wanted.stride()
    actual, limit = actual.cpu(), 1e-5
    if wanted.dtype == torch.int8:
        assert int((actual.int() - wanted.int()).abs().max()) <= 1
        return
    if wanted.dtype != torch.float32:
        limit = 2 * torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=limit, atol=limit)


def _integers(shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    """Uniform over all values of so many bits, in int8."""
    return cases.integers(*shape, seed=seed) >> (8 - bits)
