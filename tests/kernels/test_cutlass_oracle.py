"""gemm_sm80.cu and conv_sm80.cu against the reference, on a CPU: see cutlass_oracle.cpp."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.kernels import jit, reference
from fxquant.kernels.cuda import call, nvcc
from fxquant.kernels.cutlass import headers
from fxquant.kernels.cutlass.tiles import TILES, Sm80Tile
from fxquant.kernels.int4 import pack_int4
from tests.kernels import cases

ORACLE = Path(__file__).with_name("cutlass_oracle.cpp")
SOURCES = Path(call.__file__).parents[1] / "cutlass"
MISSING = (
    (None if headers.find() else headers.why_not_found())
    or (None if nvcc.find() else nvcc.why_not_found())  # for CUDA's headers
    or (None if jit.find_compiler() else "no C++ compiler was found")
)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
bounded = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SM80 = [tile for tile in TILES if isinstance(tile, Sm80Tile)]
SMALLEST = {(t.family, t.types): t for t in sorted(SM80, key=lambda t: -t.m * t.n)}
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh")
CODE = {
    torch.float32: call.FLOAT32,
    torch.float16: call.FLOAT16,
    torch.bfloat16: call.BFLOAT16,
    torch.int8: call.INT8,
}


@functools.cache
def cuda_includes() -> tuple[str, ...]:
    """The folders of CUDA's headers, as nvcc gives them to its host compiler."""
    done = subprocess.run(
        [str(nvcc.find()), "--dryrun", "-x", "cu", "/dev/null"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    assert top
    places = re.findall(r'INCLUDES="(?:-isystem" ")?(?:-I)?([^"]*)"', done.stderr)
    return tuple(place.replace("$(TOP)", top[1]) for place in places)


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """For the libraries, as long as the tests run."""
    return tempfile.TemporaryDirectory(prefix="fxquant-oracle-")


@functools.cache
def played(tile: Sm80Tile) -> ctypes.CDLL:
    """The library of a tile that plays its kernel on the CPU."""
    found = headers.find()
    assert found
    library = Path(folder().name) / f"{tile.name}.so"
    util = found.parent / "tools" / "util" / "include"
    places = (found, util, *cuda_includes(), SOURCES, ORACLE.parent)
    defines = {
        "FXQUANT_SOURCE": f'"{tile.family}.cu"',
        "FXQUANT_IS_CONV": int(tile.is_conv),
        **dict(tile.unit.defines),
    }
    flags = "-std=c++17 -O2 -ffp-contract=off -shared -fPIC -fvisibility=hidden -fpermissive -w"
    subprocess.run(
        [
            str(jit.find_compiler()), *flags.split(),
            *(f"-I{place}" for place in places),
            *(f"-D{name}={value}" for name, value in defines.items()),
            "-x", "c++", str(ORACLE), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


# ---- one layer: integers, what becomes of the sums, and the reference's answer ----


@dataclass(frozen=True)
class Ending:
    """What happens to the sums, but for the tensors."""

    zero_point: int = 3
    bias: bool = True
    channel_add: bool = False
    activation: str = "none"
    residual: torch.dtype | None = None
    out: torch.dtype = torch.float32
    out_bits: int = 8
    shift: int = 0  # elements that the output's and the residual's start is off its alignment


@dataclass(frozen=True)
class Image:
    """A convolution's sizes; ``padding`` is (top, bottom, left, right)."""

    batch: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def out(self) -> tuple[int, int]:
        high, wide = (
            (size + sum(pad) - d * (k - 1) - 1) // s + 1
            for size, pad, d, k, s in zip(
                (self.height, self.width),
                (self.padding[:2], self.padding[2:]),
                self.dilation,
                self.kernel,
                self.stride,
                strict=True,
            )
        )
        return high, wide


def integers(types: str, *shape: int, seed: int, is_weight: bool) -> Tensor:
    narrow = types == "s4" or (types == "s8s4" and is_weight)
    return (cases.nibbles if narrow else cases.integers)(*shape, seed=seed)


def unaligned(x: Tensor, shift: int) -> Tensor:
    """``x`` at an address that many elements off its alignment."""
    room = x.new_empty(x.numel() + shift)
    room[shift:] = x.flatten()
    return room[shift:].view(x.shape)


class Layer:
    """A linear (without an image) or a convolution, as the reference and the libraries take it."""

    def __init__(
        self, types: str, rows: int, n: int, end: Ending, image: Image | None, k: int = 0
    ) -> None:
        self.types, self.end, self.image, self.n = types, end, image, n
        if image is None:
            self.x = integers(types, rows, k, seed=1, is_weight=False)
            self.weight = integers(types, n, k, seed=2, is_weight=True)
            self.batch = 1
        else:
            where = (image.batch, image.channels, image.height, image.width)
            self.x = integers(types, *where, seed=1, is_weight=False)
            self.weight = integers(types, n, image.channels, *image.kernel, seed=2, is_weight=True)
            self.batch = image.batch
            rows = image.batch * image.out[0] * image.out[1]
        self.m = rows
        self.row = cases.row((0.02, float(end.zero_point)), (3.0, -7.0))
        self.weight_scale = cases.floats(n, seed=3).abs() * 0.02 + 0.001
        self.bias = cases.floats(n, seed=4) * 10 if end.bias else None
        add = cases.floats(self.batch, n, seed=5) * 10 if end.channel_add else None
        self.channel_add = add
        made = None if end.residual is None else cases.floats(rows, n, seed=6).to(end.residual) * 4
        self.residual = None if made is None else unaligned(made, end.shift)

    def _bytes(self, x: Tensor, four_bits: bool) -> Tensor:
        """As a library reads it: channels last, four bits packed."""
        rows = x if x.dim() == 2 else x.permute(0, 2, 3, 1).contiguous()
        return pack_int4(rows.flatten(1)) if four_bits else rows

    def _tap_sums(self) -> Tensor:
        """Sums of weights by tap and output channel, int32 ``[taps, N]``."""
        taps = self.weight.flatten(2) if self.weight.dim() == 4 else self.weight[..., None]
        return taps.sum(1, dtype=torch.int32).T.contiguous()

    def expected(self) -> Tensor:
        """The reference's output, ``[m, n]``."""
        end = self.end
        index = 1 if end.out == torch.int8 else -1
        ending = (index, end.out_bits, end.out)
        if self.image is None:
            return reference.linear(
                self.x, self.row, 0, self.weight, self.weight_scale, self.bias, 8, end.activation,
                self.residual, *ending,
            )  # fmt: skip
        i = self.image
        residual = self.residual
        if residual is not None:
            residual = residual.view(i.batch, *i.out, self.n).permute(0, 3, 1, 2)
        y = reference.conv2d(
            self.x, self.row, 0, self.weight, self.weight_scale, self.bias, 8, i.kernel, i.stride,
            i.padding, i.dilation, 1, self.channel_add, end.activation, residual, *ending,
        )  # fmt: skip
        return y.permute(0, 2, 3, 1).reshape(self.m, self.n)

    def call(self, out: Tensor) -> call.Call:
        """The call that writes ``out``."""
        x = self._bytes(self.x, self.types == "s4")
        weight = self._bytes(self.weight, self.types != "s8")
        taps = self._tap_sums()
        sums = taps.sum(0, dtype=torch.int32)
        self.kept_alive = (x, weight, taps, sums)
        made = call.Call(version=call.ABI, m=self.m, n=self.n)
        made.x, made.weight = x.data_ptr(), weight.data_ptr()
        made.k = self.weight[0].numel()
        e, end = made.epilogue, self.end
        e.row, e.weight_scale = self.row.data_ptr(), self.weight_scale.data_ptr()
        e.weight_sums, e.tap_sums = sums.data_ptr(), taps.data_ptr()
        for name in ("bias", "channel_add", "residual"):
            tensor = getattr(self, name)
            setattr(e, name, None if tensor is None else tensor.data_ptr())
        e.out, e.out_type, e.out_bits = out.data_ptr(), CODE[end.out], end.out_bits
        e.out_index = 1 if end.out == torch.int8 else -1
        e.activation = ACTIVATIONS.index(end.activation)
        e.residual_type = 0 if end.residual is None else CODE[end.residual]
        if self.image is not None:
            i = self.image
            made.batch, made.height, made.width = i.batch, i.height, i.width
            made.channels = i.channels
            made.kernel_h, made.kernel_w = i.kernel
            made.stride_h, made.stride_w = i.stride
            made.dilation_h, made.dilation_w = i.dilation
            made.pad_top, _, made.pad_left, _ = i.padding
            made.out_height, made.out_width = i.out
        return made

    def check(self, library: ctypes.CDLL, ways: Sequence[str]) -> None:
        """Compare with the reference: the kernel as played, or ``finish`` in runs of columns.

        Nothing may be written around the output.
        """
        expected = self.expected()
        for way in ways:
            room = torch.full((self.m * self.n + 32 + self.end.shift,), 77, dtype=self.end.out)
            out = room[16 + self.end.shift : -16].view(self.m, self.n)
            made = self.call(out)
            if way == "kernel":
                assert library.fxquant_run(ctypes.byref(made), None) == call.OK
            else:
                sums = torch.empty(self.m, self.n, dtype=torch.int32)
                address = ctypes.c_void_p(sums.data_ptr())
                library.fxquant_reference(ctypes.byref(made), address)
                library.fxquant_finish(ctypes.byref(made), address, int(way))
            if self.end.activation == "none":
                assert torch.equal(out, expected), way
            else:
                cases.assert_near(out, expected, relative=1e-3 if _is_half(out) else 1e-5)
            assert (room[: 16 + self.end.shift] == 77).all()
            assert (room[-16:] == 77).all()


def _is_half(x: Tensor) -> bool:
    return x.dtype == torch.float16


FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
endings = st.builds(
    Ending,
    zero_point=st.sampled_from([-128, -5, 0, 127]),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.none() | FLOATS,
    out=FLOATS | st.just(torch.int8),
    out_bits=st.sampled_from([8, 4]),
    shift=st.sampled_from([0, 0, 0, 1]),
)
RUNS = ("1", "2", "4", "8")


def narrowed(end: Ending, types: str) -> Ending:
    """With a zero point that four-bit activations can have."""
    return replace(end, zero_point=end.zero_point >> 4) if types == "s4" else end


@pytest.mark.parametrize("types", ["s8", "s8s4", "s4"])
@bounded
@given(
    rows=st.integers(1, 140),
    n=st.sampled_from([1, 3, 4, 8, 60, 64, 72, 130]),
    vectors=st.integers(1, 14),
    end=endings,
)
def test_linear(types: str, rows: int, n: int, vectors: int, end: Ending) -> None:
    k = vectors * (16 if types == "s8" else 32)
    layer = Layer(types, rows, n, narrowed(end, types), None, k)
    layer.check(played(SMALLEST["gemm_sm80", types]), ("kernel", *RUNS))


@st.composite
def images(draw: st.DrawFn, step: int) -> Image:
    """Windows that leave the image on any side, and some that miss it altogether."""
    high, wide = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel = draw(pair | st.sampled_from([(1, 1), (3, 3), (7, 7), (1, 5)]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    least = [max(0, r + 1 - size) for r, size in zip(reach, (high, wide), strict=True)]
    most = [max(3, low) for low in least]
    pads = [draw(st.tuples(st.integers(0, m), st.integers(low, m + low)))
            for low, m in zip(least, most, strict=True)]  # fmt: skip
    return Image(
        draw(st.integers(1, 3)), high, wide, step * draw(st.integers(1, 5)), kernel,
        draw(pair), (*pads[0], *pads[1]), dilation,
    )  # fmt: skip


@pytest.mark.parametrize("types", ["s8", "s4"])
@bounded
@given(
    data=st.data(),
    n=st.sampled_from([1, 3, 4, 8, 60, 64, 72]),
    end=endings,
    channel_add=st.booleans(),
)
def test_convolution(
    types: str, data: st.DataObject, n: int, end: Ending, channel_add: bool
) -> None:
    image = data.draw(images(16 if types == "s8" else 32))
    end = replace(narrowed(end, types), channel_add=channel_add)
    Layer(types, 0, n, end, image).check(played(SMALLEST["conv_sm80", types]), ("kernel", *RUNS))


@pytest.mark.parametrize(
    "tile",
    [SM80[0], *(pytest.param(tile, marks=pytest.mark.slow) for tile in SM80[1:])],
    ids=lambda tile: tile.name,
)
def test_every_tile(tile: Sm80Tile) -> None:
    step = 16 if tile.types == "s8" else 32
    end = narrowed(Ending(residual=torch.float16, out=torch.int8), tile.types)
    if tile.is_conv:  # more rows, columns and channels than a tile has of them
        image = Image(3, 13, 11, tile.k + step, (3, 3), padding=(1, 0, 2, 1))
        layer = Layer(tile.types, 0, tile.n + 20, replace(end, channel_add=True), image)
    else:
        layer = Layer(tile.types, tile.m + 30, tile.n + 20, end, None, 6 * tile.k + step)
    layer.check(played(tile), ("kernel",))


@pytest.mark.parametrize("types", ["s8", "s4"])
def test_a_convolution_of_one_tap_is_a_linear(types: str) -> None:
    end = narrowed(Ending(channel_add=True, out=torch.float16), types)
    layer = Layer(types, 0, 24, end, Image(3, 5, 7, 64, (1, 1)))
    layer.check(played(SMALLEST["gemm_sm80", types]), ("kernel",))


def test_the_largest_sums_are_exact() -> None:
    layer = Layer("s8", 5, 8, Ending(zero_point=127, bias=False), None, 65776)
    layer.x.fill_(-128)
    layer.weight.fill_(-128)
    layer.check(played(SMALLEST["gemm_sm80", "s8"]), ("kernel", "4"))


@pytest.mark.parametrize("zero_point", [4e4, -129.0, 1e30, float("-inf"), float("nan")])
def test_a_forged_zero_point_is_clamped(zero_point: float) -> None:
    """The largest sums and weights: any other zero point would carry them out of int32."""
    layer = Layer("s8", 5, 8, Ending(bias=False), None, 65776)
    layer.x.fill_(127 if zero_point > 0 else -128)
    layer.weight.fill_(-128)
    layer.row[0, 1] = 127.0 if zero_point > 0 else -128.0
    expected = layer.expected()
    layer.row[0, 1] = zero_point
    layer.expected = lambda: expected  # type: ignore[method-assign]
    layer.check(played(SMALLEST["gemm_sm80", "s8"]), ("kernel", "4"))


def test_a_null_pointer_is_refused_before_a_launch() -> None:
    layer = Layer("s8", 0, 8, Ending(), Image(1, 5, 5, 16, (3, 3), padding=(0, 0, 0, 1)))
    out = torch.empty(layer.m, 8)
    made = layer.call(out)
    run = played(SMALLEST["conv_sm80", "s8"]).fxquant_run
    assert run(ctypes.byref(made), None) == call.OK
    made.epilogue.tap_sums = None
    assert run(ctypes.byref(made), None) == 3


REFUSED = {
    "another version": ({"version": call.ABI + 1}, 1),
    "no rows": ({"m": 0}, 2),
    "k is no multiple of 16 bytes": ({"k": 72}, 2),
    "a sum could overflow": ({"k": 65808}, 2),
    "a channel_add without an image": ({"channel_add": 1 << 20}, 2),
    "x is off its alignment": ({"x": (1 << 20) + 8}, 3),
    "the output is off its own type": ({"out": (1 << 20) + 1}, 3),
    "the output's type is unknown": ({"out_type": 9}, 4),
    "an integer output of a float type": ({"out_index": 0}, 4),
    "the residual's type is unknown": ({"residual": 1 << 20, "residual_type": call.INT8}, 4),
    "the activation is unknown": ({"activation": 4}, 4),
}


@pytest.mark.parametrize(("fields", "status"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused(fields: dict[str, int], status: int) -> None:
    good = {"m": 7, "n": 3, "k": 64, "out_type": call.FLOAT16}
    can_run = played(SMALLEST["gemm_sm80", "s8"]).fxquant_can_run
    assert can_run(ctypes.byref(call.example(good.items()))) == call.OK
    assert can_run(ctypes.byref(call.example({**good, **fields}.items()))) == status


CONV = {
    "m": 2 * 8 * 8, "n": 5, "k": 9 * 32, "batch": 2, "height": 8, "width": 8, "channels": 32,
    "kernel_h": 3, "kernel_w": 3, "stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1,
    "pad_top": 1, "pad_left": 1, "out_height": 8, "out_width": 8, "out_type": call.FLOAT16,
}  # fmt: skip
REFUSED_CONV = {
    "no image": dict.fromkeys(("batch", "height", "width"), 0),
    "channels that are no multiple of 16": {"channels": 24, "k": 9 * 24},
    "m is not the output's": {"m": 127},
    "k is not the window's": {"k": 8 * 32},
    "more taps than CUTLASS has bits": {"kernel_h": 33, "k": 33 * 3 * 32},
    "a stride of zero": {"stride_w": 0},
    "more activations than int32 counts": {"batch": 1 << 21, "m": 64 << 21},
}


@pytest.mark.parametrize("fields", REFUSED_CONV.values(), ids=list(REFUSED_CONV))
def test_what_a_convolution_refuses(fields: dict[str, int]) -> None:
    can_run = played(SMALLEST["conv_sm80", "s8"]).fxquant_can_run
    assert can_run(ctypes.byref(call.example(CONV.items()))) == call.OK
    assert can_run(ctypes.byref(call.example({**CONV, **fields}.items()))) == 2
