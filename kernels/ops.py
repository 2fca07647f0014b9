"""The ``fxquant::`` operators: schemas, shapes, and the hand-over to the kernel each call names.

Importing this module registers these operators and nothing else. Activation integers are int8 or
uint8 (q + 128), ``row`` is float32 ``[n, 2]`` of scale and zero point: see `reference`, where each
operator is written out. An ``index`` (``out_index``) below 0 means a float output of ``dtype``
(``out_dtype``). Images come out channels last, tokens contiguous: see `layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels import dispatch, layout
from fxquant.kernels.reference import GATED

SCHEMAS = {
    "quantize": (
        "(Tensor x, Tensor row, int index, int bits, str activation, ScalarType dtype, "
        "str kernel) -> Tensor"
    ),
    "linear": (
        "(Tensor x, Tensor row, int x_index, Tensor weight, Tensor weight_scale, Tensor? bias, "
        "int weight_bits, str activation, Tensor? residual, int out_index, int out_bits, "
        "ScalarType out_dtype, str kernel) -> Tensor"
    ),
    "conv2d": (
        "(Tensor x, Tensor row, int x_index, Tensor weight, Tensor weight_scale, Tensor? bias, "
        "int weight_bits, int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, "
        "int groups, Tensor? channel_add, str activation, Tensor? residual, int out_index, "
        "int out_bits, ScalarType out_dtype, str kernel) -> Tensor"
    ),
    "group_norm_silu_quantize": (
        "(Tensor x, Tensor row, int index, int bits, Tensor? weight, Tensor? bias, int groups, "
        "float eps, str activation, ScalarType dtype, str kernel) -> Tensor"
    ),
    "layer_norm_quantize": (
        "(Tensor x, Tensor row, int index, int bits, Tensor? weight, Tensor? bias, float eps, "
        "ScalarType dtype, str kernel) -> Tensor"
    ),
    "geglu_quantize": (
        "(Tensor x, Tensor row, int index, int bits, str approximate, ScalarType dtype, "
        "str kernel) -> Tensor"
    ),
    "cat_quantize": (
        "(Tensor[] xs, Tensor row, int index, int bits, int dim, ScalarType dtype, str kernel) "
        "-> Tensor"
    ),
    "upsample_quantize": (
        "(Tensor x, Tensor row, int index, int bits, int factor, ScalarType dtype, str kernel) "
        "-> Tensor"
    ),
    "add_quantize": (
        "(Tensor a, Tensor b, Tensor row, int index, int bits, ScalarType dtype, str kernel) "
        "-> Tensor"
    ),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor row, int q_index, int k_index, int v_index, "
        "Tensor? mask, float? scale, int out_index, int out_bits, ScalarType out_dtype, "
        "str kernel) -> Tensor"
    ),
}


def _fake_quantize(
    x: Tensor, row: Tensor, index: int, bits: int, activation: str, dtype: torch.dtype, kernel: str
) -> Tensor:
    return layout.empty_image(x.shape, dtype, x.device)


def _fake_linear(x: Tensor, row: Tensor, x_index: int, weight: Tensor, *rest: Any) -> Tensor:
    out_dtype, activation = rest[-2], rest[-6]
    columns = weight.shape[0] // (2 if activation in GATED else 1)
    return x.new_empty((*x.shape[:-1], columns), dtype=out_dtype)


def _fake_conv2d(
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
    *rest: Any,
) -> Tensor:
    out_dtype = rest[-2]
    size = layout.convolved(x.shape[2:], kernel_size, stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], *size)
    return layout.empty_image(shape, out_dtype, x.device)


def _fake_group_norm(x: Tensor, *rest: Any) -> Tensor:
    return layout.empty_channels_last(x.shape, rest[-2], x.device)


def _fake_layer_norm(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=rest[-2], device=x.device)


def _fake_geglu(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=rest[-2], device=x.device)


def _fake_cat(
    xs: Sequence[Tensor],
    row: Tensor,
    index: int,
    bits: int,
    dim: int,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    shape = list(xs[0].shape)
    shape[dim] = sum(x.shape[dim] for x in xs)
    return layout.empty_image(shape, dtype, xs[0].device)


def _fake_upsample(
    x: Tensor, row: Tensor, index: int, bits: int, factor: int, dtype: torch.dtype, kernel: str
) -> Tensor:
    batch, channels, height, width = x.shape
    shape = (batch, channels, height * factor, width * factor)
    return layout.empty_image(shape, dtype, x.device)


def _fake_add(
    a: Tensor, b: Tensor, row: Tensor, index: int, bits: int, dtype: torch.dtype, kernel: str
) -> Tensor:
    return layout.empty_image(a.shape, dtype, a.device)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return layout.empty_heads((*q.shape[:-1], v.shape[-1]), rest[-2], q.device)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "quantize": _fake_quantize,
    "linear": _fake_linear,
    "conv2d": _fake_conv2d,
    "group_norm_silu_quantize": _fake_group_norm,
    "layer_norm_quantize": _fake_layer_norm,
    "geglu_quantize": _fake_geglu,
    "cat_quantize": _fake_cat,
    "upsample_quantize": _fake_upsample,
    "add_quantize": _fake_add,
    "attention": _fake_attention,
}


def _call(op: str) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        return dispatch.run(op, args[-1])(*args[:-1])

    return call


# Kept alive for the life of the process: a Library takes its operators with it.
_LIBRARY = torch.library.Library("fxquant", "DEF")
for _op, _schema in SCHEMAS.items():
    _LIBRARY.define(_op + _schema)
    _LIBRARY.impl(_op, _call(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxquant::{_op}", _FAKES[_op], lib=_LIBRARY)
