"""Linear and conv2d on oneDNN's u8 x s8 -> s32 kernels.

Gated on VNNI: without it oneDNN sums pairs of products in saturating int16. Four-bit weights are
unpacked to int8 when they are packed, so they run the same integer arithmetic. oneDNN fuses the
bias, one activation, a linear's residual and the requantisation; what it cannot fuse is done on
its output, in place where that is a float tensor of the caller's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels import jit, layout, reference
from fxquant.kernels.config import Config
from fxquant.kernels.int4 import unpacked
from fxquant.kernels.pack import Packed, packed
from fxquant.kernels.x86 import producers

_onednn = torch.ops.onednn
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LINEAR_POST = {
    "none": ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
_CONV_POST = {"none": "none", "silu": "swish"}


def why_not(config: Config) -> str | None:
    """Why int8 weights cannot run here."""
    if not 5 <= config.options["weight_bits"] <= 8:
        return f"its weights have 5 to 8 bits, not {config.options['weight_bits']}"
    return _why_not(config)


def why_not_int4(config: Config) -> str | None:
    """Why packed four-bit weights cannot run here."""
    if not 2 <= config.options["weight_bits"] <= 4:
        return f"its weights have 2 to 4 bits, not {config.options['weight_bits']}"
    return _why_not(config)


def _why_not(config: Config) -> str | None:
    if config.machine.arch != "x86_64":
        return f"it runs on x86_64, this is {config.machine.arch}"
    if not config.machine.has_vnni:
        return "the CPU has no VNNI, without which u8 x s8 sums saturate"
    if config.tensors["x"].dtype != torch.uint8:
        return f"its activations are stored as uint8, not {config.tensors['x'].dtype}"
    if config.options.get("groups", 1) != 1:
        return f"it has no grouped convolution ({config.options['groups']} groups)"
    return None


def prepare_linear(
    weight: Tensor, weight_bits: int, in_features: int, activation: str = "none"
) -> Packed:
    """Pack a linear's weight now instead of at its first use, in one way for any activation."""

    def make() -> Packed:
        natural = unpacked(weight, weight_bits, (weight.shape[0], in_features))
        return Packed(_onednn.qlinear_prepack(natural, None), _zeros(natural))

    return packed(weight, make, "onednn")


def prepare_conv2d(
    weight: Tensor, weight_bits: int, in_channels: int, kernel_size: Sequence[int]
) -> Packed:
    """Pack a convolution's weight now instead of at its first use."""

    def make() -> Packed:
        shape = (weight.shape[0], in_channels, *kernel_size)
        natural = unpacked(weight, weight_bits, shape)
        ones = torch.ones(shape[0])
        # The pack depends on none of the scale, zero point, stride, padding and dilation.
        weights = _onednn.qconv_prepack(natural, ones, 1.0, 0, [1, 1], [0, 0], [1, 1], 1, None)
        return Packed(weights, _zeros(natural))

    return packed(weight, make, "onednn")


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
    if activation in reference.GATED:
        inputs = (x, row, x_index, weight, weight_scale, bias, weight_bits)
        y = linear(*inputs, "none", None, -1, 8, torch.float32)
        return _gated(y, activation, row, out_index, out_bits, out_dtype)
    pack = prepare_linear(weight, weight_bits, x.shape[-1])
    scale, zero_point = _step(row, x_index)
    out = _Output(row, out_index, out_bits, out_dtype, ends_fused=residual is None)
    operands = (x.contiguous(), scale, zero_point, pack.weight, weight_scale, pack.sums)
    bias = None if bias is None else bias.float()
    end = (out.scale, out.zero_point, out.dtype)
    if residual is not None and activation == "none":
        residual = residual.contiguous()
        y = _onednn.qlinear_pointwise.binary(
            *operands, residual, bias, *end, 1.0, 0, "add", 1.0, "none", [], ""
        )
        return out.finished(y)
    post, algorithm = _LINEAR_POST[activation]
    y = _onednn.qlinear_pointwise(*operands, bias, *end, post, [], algorithm)
    return out.finished(y if residual is None else y.add_(residual))


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
    if (
        max(stride) > 1
        and layout.convolved(x.shape[2:], kernel_size, stride, padding, dilation)[1] == 1
    ):  # oneDNN 3.x multiplies the zero point wrongly
        return reference.conv2d(
            x, row, x_index, weight, weight_scale, bias, weight_bits, kernel_size, stride, padding,
            dilation, groups, channel_add, activation, residual, out_index, out_bits, out_dtype,
        )  # fmt: skip
    pack = prepare_conv2d(weight, weight_bits, x.shape[1], kernel_size)
    scale, zero_point = _step(row, x_index)
    x, symmetric = _padded(x, padding, zero_point, _pads(kernel_size, padding, dilation))
    bias, channel_add = _folded(bias, channel_add)
    fused = activation in _CONV_POST and channel_add is None
    out = _Output(row, out_index, out_bits, out_dtype, ends_fused=fused and residual is None)
    y = _onednn.qconv2d_pointwise(
        x, scale, zero_point, pack.weight, weight_scale, pack.sums, bias,
        list(stride), symmetric, list(dilation), groups, out.scale, out.zero_point,
        torch.float32 if out.dtype == torch.float16 else out.dtype,  # it has no f16 output
        _CONV_POST[activation] if fused else "none", [], None,
    )  # fmt: skip
    if channel_add is not None:
        # In one dtype: torch adds a broadcast float32 to bfloat16 fifty times slower.
        y.add_(channel_add.to(y.dtype)[:, :, None, None])
    if not fused:
        y = _activated(y, activation)
    return layout.image(out.finished(y if residual is None else y.add_(residual)))


class _Output:
    """How the result leaves oneDNN, and what is left to do to it.

    A quantised result leaves as uint8 when nothing follows (``ends_fused``), else as float32.
    """

    def __init__(
        self, row: Tensor, index: int, bits: int, dtype: torch.dtype, ends_fused: bool
    ) -> None:
        self._row, self._index, self._bits, self._target = row, index, bits, dtype
        self.scale, self.zero_point, self.dtype = 1.0, 0, dtype
        if index >= 0 and ends_fused:
            self.scale, self.zero_point = _step(row, index)
            self.dtype = torch.uint8
        elif index >= 0:
            self.dtype = torch.float32

    def finished(self, y: Tensor) -> Tensor:
        """``y`` as it left oneDNN, with whatever was added to it, in the wanted form."""
        if self._index < 0:
            return y.to(self._target)
        if self.dtype == torch.float32:
            return _requantize()(y, self._row, self._index, self._bits, "none", self._target)
        if self._bits < 8:
            half = 1 << (self._bits - 1)
            y = y.clamp_(128 - half, 127 + half)
        return y if self._target == torch.uint8 else y.bitwise_xor_(128).view(torch.int8)


def _step(row: Tensor, index: int) -> tuple[float, int]:
    """Scale and zero point of quantiser ``index``, for uint8 storage."""
    scale, zero_point = row[index].tolist()
    return scale, int(zero_point) + 128


def _pads(kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Is oneDNN right, and no reader of foreign memory, when it pads?

    It is with a square odd kernel, by the same on all sides and no more than half of the reach;
    and along one axis.
    """
    top, bottom, left, right = padding
    if kernel[0] == 1 and top == bottom == 0 and left == right:
        return left <= dilation[1] * (kernel[1] - 1) // 2
    square = kernel[0] == kernel[1] and dilation[0] == dilation[1] and kernel[0] % 2 == 1
    return square and {*padding} == {top} and top <= dilation[0] * (kernel[0] - 1) // 2


def _padded(
    x: Tensor, padding: Sequence[int], zero_point: int, by_onednn: bool
) -> tuple[Tensor, list[int]]:
    """``x`` and the padding that oneDNN is left to do; it pads with the zero point."""
    top, bottom, left, right = padding
    if by_onednn or not any(padding):
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom), value=zero_point), [0, 0]


def _folded(bias: Tensor | None, channel_add: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Bias and the part of ``channel_add`` that is not in it.

    Samples of one timestep have equal rows, and then adding them costs nothing.
    """
    bias = None if bias is None else bias.float()
    if channel_add is None:
        return bias, None
    if channel_add.shape[0] > 1 and not torch.equal(channel_add[1:], channel_add[:-1]):
        return bias, channel_add
    first = channel_add[0].float()
    return (first if bias is None else bias + first), None


def _activated(y: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(y, inplace=True)
    if activation == "none":
        return y
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _gated(
    y: Tensor, activation: str, row: Tensor, index: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """The first half of float32 ``y`` times the activated second half."""
    gate = reference.GATED[activation]
    if index < 0:
        value, other = y.chunk(2, dim=-1)
        return (value * _activated(other, gate)).to(dtype)
    ends = producers if jit.find_compiler() else reference
    return ends.geglu_quantize(
        y, row, index, bits, "tanh" if gate == "gelu_tanh" else "none", dtype
    )


def _zeros(natural: Tensor) -> Tensor:
    return torch.zeros(natural.shape[0], dtype=torch.int32)


@functools.cache
def _requantize() -> Callable[..., Tensor]:
    return producers.quantize if jit.find_compiler() else reference.quantize
