"""Linear and conv2d on a GPU's integer tensor cores: the Python face of the CUTLASS libraries.

All that follows the sums is in the kernel's epilogue; a GEGLU is a kernel of its own after it.
Weights are used where they lie: int8 linears and channels-last convolutions as they are, int4
linears as nibbles. An int4 convolution's weights are unpacked into a scratch just before it runs,
so that they take four bits each in between.

Nothing here waits for the GPU, reads from it, or allocates outside torch's allocator: steps can be
captured in CUDA graphs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import OperandError
from fxquant.kernels import layout, reference
from fxquant.kernels.config import Config
from fxquant.kernels.cuda import build, call, launch, producers, weights
from fxquant.kernels.cutlass import refusals
from fxquant.kernels.cutlass.choose import Problem, fitting, to_try
from fxquant.kernels.cutlass.operands import check, check_weight, epilogue, expanded
from fxquant.kernels.int4 import pack_int4, unpacked
from fxquant.kernels.pack import Packed, packed

_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "s8"}
_STEP = {"s8": 16, "s8s4": 32, "s4": 32}  # integers in 16 bytes of the narrower operand


@dataclass(frozen=True)
class Products:
    """The two operators for one pair of operand types: ``s8``, ``s8s4`` (weights) or ``s4``."""

    types: str

    def why_not(self, config: Config) -> str | None:
        """Why such operands cannot be multiplied here."""
        return refusals.why_not(self.types, config)

    def linear(
        self,
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
        """As `reference.linear`, on int8 ``x`` on a GPU.

        Raises:
            OperandError: a dtype, device, shape or range that the kernels do not have.
        """
        tensors = {"bias": bias, "residual": residual}
        check(x, row, weight, weight_scale, (x_index, out_index), activation, out_dtype, tensors)
        channels, outputs = x.shape[-1], weight.shape[0]
        check_weight(weight, weight_bits, channels)
        if activation in reference.GATED:
            if residual is not None or weight.shape[0] % 2:
                raise OperandError(f"{activation} takes no residual, and even numbers of channels")
            inputs = (x, row, x_index, weight, weight_scale, bias, weight_bits)
            wide = torch.float16 if out_index >= 0 else out_dtype  # overflows as fp16 models do
            y = self.linear(*inputs, "none", None, -1, 8, wide)
            return _gated(y, activation, row, out_index, out_bits, out_dtype)
        pack = self.prepare(weight, weight_bits, channels, (1, 1))
        out = torch.empty((*x.shape[:-1], outputs), dtype=out_dtype, device=x.device)
        rows = out.numel() // max(outputs, 1)
        end = epilogue(
            row, x_index, weight_scale, pack.sums, bias, None, activation, residual, out,
            out_index, out_bits,
        )  # fmt: skip
        self._run("gemm", x, weight, pack, end, out, {"m": rows, "n": outputs}, (1, 1))
        return out

    def conv2d(
        self,
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
        """As `reference.conv2d`, on int8 ``x`` on a GPU and with ``groups`` 1.

        Raises:
            OperandError: a dtype, device, shape or range that the kernels do not have.
        """
        tensors = {"bias": bias, "residual": residual, "channel_add": channel_add}
        check(x, row, weight, weight_scale, (x_index, out_index), activation, out_dtype, tensors)
        if groups != 1 or activation in reference.GATED:
            raise OperandError(f"no convolution here has {groups} groups and ends in {activation}")
        batch, channels, height, width = x.shape
        check_weight(weight, weight_bits, channels * kernel_size[0] * kernel_size[1])
        pack = self.prepare(weight, weight_bits, channels, kernel_size)
        out_height, out_width = layout.convolved(
            (height, width), kernel_size, stride, padding, dilation
        )
        shape = (batch, weight.shape[0], out_height, out_width)
        out = layout.empty_image(shape, out_dtype, x.device)
        if residual is not None:
            residual = residual.permute(0, 2, 3, 1)
        if channel_add is not None:
            channel_add = expanded("channel_add", channel_add, (batch, weight.shape[0]))
        end = epilogue(
            row, x_index, weight_scale, pack.sums, bias, channel_add, activation, residual,
            out.permute(0, 2, 3, 1), out_index, out_bits,
        )  # fmt: skip
        top, _, left, _ = padding
        image = {
            "m": batch * out_height * out_width, "n": weight.shape[0],
            "batch": batch, "height": height, "width": width,
            "kernel_h": kernel_size[0], "kernel_w": kernel_size[1],
            "stride_h": stride[0], "stride_w": stride[1], "pad_top": top, "pad_left": left,
            "dilation_h": dilation[0], "dilation_w": dilation[1],
            "out_height": out_height, "out_width": out_width,
        }  # fmt: skip
        images = x.permute(0, 2, 3, 1)
        by_pixel = (*kernel_size, *stride, *padding) == (1, 1, 1, 1, 0, 0, 0, 0)
        op = "gemm" if by_pixel else "conv"
        self._run(op, images, weight, pack, end, out, image, kernel_size)
        return out

    def prepare_linear(
        self, weight: Tensor, weight_bits: int, in_features: int, activation: str = "none"
    ) -> Packed:
        """`prepare` of a linear."""
        return self.prepare(weight, weight_bits, in_features, (1, 1))

    def prepare_conv2d(
        self, weight: Tensor, weight_bits: int, in_channels: int, kernel_size: Sequence[int]
    ) -> Packed:
        """`prepare` of a convolution."""
        return self.prepare(weight, weight_bits, in_channels, kernel_size)

    def prepare(
        self, weight: Tensor, bits: int, channels: int, kernel_size: Sequence[int]
    ) -> Packed:
        """A weight's sums and, where it needs another order or padding, its integers; once.

        ``sums`` is int32 [1 + taps, N]: of an output channel's integers, then of each tap's.
        ``weight`` is [N, taps, channels up to whole 16 bytes] in memory, of int8 or nibbles. That
        of an int4 convolution is empty: `_run` unpacks the canonical one.
        """
        taps = kernel_size[0] * kernel_size[1]

        def make() -> Packed:
            natural = unpacked(weight, bits, (weight.shape[0], channels, *kernel_size))
            natural = natural.reshape(weight.shape[0], channels, taps)
            by_tap = natural.sum(1, dtype=torch.int32).T
            sums = torch.cat((by_tap.sum(0, keepdim=True, dtype=torch.int32), by_tap))
            return Packed(self._in_order(weight, natural), sums.contiguous())

        return packed(weight, make, ("cutlass", self.types, channels, *kernel_size))

    def _in_order(self, weight: Tensor, natural: Tensor) -> Tensor:
        """See `prepare`. What already lies in order is aliased, not returned: a form that held its
        own weight would never be freed."""
        channels, taps = natural.shape[1:]
        pad = -channels % _STEP[self.types]
        if self.types == "s8s4" and taps > 1:
            return weight.new_empty(0)
        if not pad and (_is_krsc(weight) if self.types == "s8" else taps == 1):
            return weight.detach()
        ordered = F.pad(natural.transpose(1, 2), (0, pad)).contiguous()
        return ordered if self.types == "s8" else pack_int4(ordered)

    def _run(
        self,
        op: str,
        x: Tensor,
        weight: Tensor,
        pack: Packed,
        end: call.Epilogue,
        out: Tensor,
        sizes: dict[str, int],
        kernel_size: Sequence[int],
    ) -> None:
        """Choose a library and launch it. ``x`` is in memory order, its channels last."""
        if out.numel() == 0:
            return
        taps, channels = kernel_size[0] * kernel_size[1], x.shape[-1]
        units, gpu, multiprocessors = _gpu(x.device)
        types, integers = self.types, pack.weight
        if types == "s8s4" and (op == "conv" or not fitting(op, types, units)):
            types = "s8"
            padded = channels + -channels % _STEP[types]
            integers = weights.unpack_conv(weight, channels, kernel_size, padded)
        pad = -channels % _STEP[types]
        if types == "s4":
            x = weights.pack_int4(x.contiguous(), channels + pad)
        else:
            x = F.pad(x, (0, pad)) if pad else x.contiguous()
        k = taps * (channels + pad)
        problem = Problem(op, types, _NAMES[out.dtype], sizes["m"], sizes["n"], k)
        made = call.Call(
            version=call.ABI, multiprocessors=multiprocessors, x=x.data_ptr(),
            weight=integers.data_ptr(), k=k, channels=channels + pad if "batch" in sizes else 0,
            epilogue=end, **sizes,
        )  # fmt: skip
        tiles = to_try(problem, units, gpu, multiprocessors)
        libraries = [_library(tile, x.device) for tile in tiles]
        if not libraries:
            raise OperandError(f"no library that is built for this GPU can do {problem}")
        able = (one for one in libraries if one.fxquant_can_run(ctypes.byref(made)) == call.OK)
        _launch(next(able, libraries[0]), made, x.device)  # a library that refuses says why


INT8, INT4, W4A4 = Products("s8"), Products("s8s4"), Products("s4")


def _is_krsc(weight: Tensor) -> bool:
    if weight.dim() == 4:
        return weight.is_contiguous(memory_format=torch.channels_last)
    return weight.is_contiguous()


def _gated(
    y: Tensor, activation: str, row: Tensor, index: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """The first half of ``y`` times the activated second half."""
    if index >= 0:
        approximate = "tanh" if activation == "geglu_tanh" else "none"
        return producers.geglu_quantize(y, row, index, bits, approximate, dtype)
    return reference.gated(y.float(), activation).to(dtype)


@functools.cache
def _gpu(device: torch.device) -> tuple[frozenset[str], str, int]:
    """The libraries that are there for a GPU, its name, and how many multiprocessors it has."""
    found: Any = torch.cuda.get_device_properties(device)
    units = build.available(f"{found.major}.{found.minor}")
    return units, found.name, found.multi_processor_count


@functools.cache
def _library(unit: str, device: torch.device) -> ctypes.CDLL:
    library = build.library(unit, device)
    library.fxquant_workspace.restype = ctypes.c_int64
    library.fxquant_run.argtypes = (ctypes.POINTER(call.Call), ctypes.c_void_p)
    return library


def _launch(library: ctypes.CDLL, made: call.Call, device: torch.device) -> None:
    size = library.fxquant_workspace(ctypes.byref(made))
    if size > 0:
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        made.workspace, made.workspace_bytes = workspace.data_ptr(), size
    launch.run(library, "fxquant_run", device, ctypes.byref(made))
