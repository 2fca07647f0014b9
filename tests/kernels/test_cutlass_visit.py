"""gemm_sm90a.cu and conv_sm90a.cu as far as a host can run them: see cutlass_visit.cu.

Not their products: those need wgmma. FinishNode gets sums that are made here, in the partition of
its collective, and must write what epilogue.h writes; the launch meets a driver that may refuse.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.kernels.cuda import call, nvcc
from fxquant.kernels.cutlass import headers
from fxquant.kernels.cutlass.tiles import TILES, Sm90aTile
from tests.kernels import test_cutlass_oracle as oracle
from tests.kernels.test_cutlass_oracle import Ending, Image, Layer

pytestmark = [oracle.pytestmark, pytest.mark.slow]
bounded = settings(max_examples=25, deadline=None, derandomize=True, database=None)

# No tensor core is needed: device code for an old architecture, which has none of wgmma, is quick.
FLAGS = (
    "--expt-relaxed-constexpr", "-std=c++17", "-O1", "-DNDEBUG", "-shared",
    "-gencode", "arch=compute_80,code=compute_80",
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off",
)  # fmt: skip
SM90 = [tile for tile in TILES if isinstance(tile, Sm90aTile)]
# One of each kernel schedule, and each type of output.
VISITED = [
    next(t for t in SM90 if (t.schedule, t.out, t.m) == wanted)
    for wanted in (
        ("cooperative", "s8", 128),
        ("pingpong", "bf16", 64),
        ("one_consumer", "f16", 64),
    )
]
each_tile = pytest.mark.parametrize("tile", VISITED, ids=lambda tile: tile.name)
OUT = {"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}


@functools.cache
def visited(tile: Sm90aTile) -> ctypes.CDLL:
    """A tile's driver with the test's part."""
    compiler, here = nvcc.find(), Path(__file__).parent
    assert compiler
    places = (*headers.includes()[0], oracle.SOURCES, oracle.SOURCES.parent / "cuda", here)
    library = Path(oracle.folder().name) / f"visit_{tile.name}.so"
    subprocess.run(
        [
            compiler, *FLAGS, *(f"-I{place}" for place in places),
            f'-DFXQUANT_SOURCE="{tile.family}.cu"',
            *(f"-D{name}={value}" for name, value in tile.unit.defines),
            str(here / "cutlass_visit.cu"), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    found = ctypes.CDLL(str(library))
    found.fxquant_visit.restype = ctypes.c_int64
    found.fxquant_last_error.restype = ctypes.c_char_p
    return found


def sums_of(layer: Layer) -> Tensor:
    """int32 [m, n] as the products leave them: with zeros for what lies outside an image."""
    x, weight, image = layer.x.double(), layer.weight.double(), layer.image
    if image is None:
        return (x @ weight.T).int()
    top, bottom, left, right = image.padding
    y = F.conv2d(
        F.pad(x, (left, right, top, bottom)), weight, None, image.stride, 0, image.dilation
    )
    return y.permute(0, 2, 3, 1).reshape(layer.m, layer.n).int().contiguous()


def check(tile: Sm90aTile, layer: Layer) -> None:
    """What FinishNode writes is epilogue.h's to the bit, and every value is written once."""
    library, sums = visited(tile), sums_of(layer)
    address = ctypes.c_void_p(sums.data_ptr())
    got, expected = (torch.full((layer.m, layer.n), 77, dtype=layer.end.out) for _ in range(2))
    assert library.fxquant_can_run(ctypes.byref(layer.call(got))) == call.OK
    assert library.fxquant_visit(ctypes.byref(layer.call(got)), address) == got.numel()
    library.fxquant_finish(ctypes.byref(layer.call(expected)), address)
    assert torch.equal(got, expected)
    if layer.end.activation == "none":
        assert torch.equal(got, layer.expected())


endings = st.builds(
    Ending,
    zero_point=st.sampled_from([-128, -5, 0, 127]),
    bias=st.booleans(),
    activation=st.sampled_from(oracle.ACTIVATIONS),
    residual=st.none() | oracle.FLOATS,
    out_bits=st.sampled_from([8, 4]),
)


def ending(tile: Sm90aTile, end: Ending) -> Ending:
    """With the tile's type of output."""
    return replace(end, out=OUT[tile.out])


@each_tile
@bounded
@given(
    rows=st.integers(1, 300), n=st.sampled_from([16, 48, 128, 144, 336]), end=endings,
    data=st.data(),
)  # fmt: skip
def test_every_thread_of_every_tile(
    tile: Sm90aTile, rows: int, n: int, end: Ending, data: st.DataObject
) -> None:
    end = ending(tile, end)
    if not tile.is_conv:
        check(tile, Layer("s8", rows, n, end, None, 32))
        return
    image = data.draw(oracle.images(16))
    layer = Layer("s8", 0, n, replace(end, channel_add=data.draw(st.booleans())), image)
    made = layer.call(torch.empty(layer.m, n, dtype=end.out))
    # What TMA's im2col does not take is refused: test_cuda_gate's probes, and not this test's.
    if visited(tile).fxquant_can_run(ctypes.byref(made)) == call.OK:
        check(tile, layer)


PADDED = Image(2, 9, 13, 16, (3, 3), padding=(1, 1, 1, 1))


def layer_for(tile: Sm90aTile, end: Ending) -> Layer:
    """A layer of more than one tile."""
    if tile.is_conv:
        return Layer("s8", 0, 80, ending(tile, end), PADDED)
    return Layer("s8", 154, 144, ending(tile, end), None, 64)


@each_tile
@pytest.mark.parametrize("zero_point", [4e4, -129.0, 1e30, float("inf"), float("nan")])
def test_a_forged_zero_point_is_clamped(tile: Sm90aTile, zero_point: float) -> None:
    layer = layer_for(tile, Ending(bias=False))
    layer.row[0, 1] = zero_point
    sums, made = sums_of(layer), torch.empty(layer.m, layer.n, dtype=layer.end.out)
    visited(tile).fxquant_visit(ctypes.byref(layer.call(made)), ctypes.c_void_p(sums.data_ptr()))
    layer.row[0, 1] = 127.0 if zero_point > 0 else -128.0
    assert torch.equal(made, layer.expected())


def launch(tile: Sm90aTile, made: call.Call, refused: int = -1) -> tuple[int, int, int]:
    """Status, descriptors asked for, kernels launched."""
    counts = (ctypes.c_int * 2)()
    status = visited(tile).fxquant_run_refusing(ctypes.byref(made), refused, counts)
    return status, *counts


@each_tile
def test_a_descriptor_that_the_driver_refuses_is_an_error(tile: Sm90aTile) -> None:
    """Of x, of the weight or of the output; the next call is none the worse for it."""
    layer = layer_for(tile, Ending())
    made = layer.call(torch.empty(layer.m, layer.n, dtype=layer.end.out))
    assert launch(tile, made) == (call.OK, 3, 1)
    for refused in range(3):
        assert launch(tile, made, refused) == (6, 3, 0)
        assert b"no TMA descriptor: CUresult 1" in visited(tile).fxquant_last_error()
        assert launch(tile, made) == (call.OK, 3, 1)


@each_tile
@pytest.mark.parametrize(
    "missing", ["x", "weight", "row", "weight_scale", "weight_sums", "tap_sums", "out"]
)
def test_a_null_pointer_is_refused_before_anything(tile: Sm90aTile, missing: str) -> None:
    layer = layer_for(tile, Ending())
    made = layer.call(torch.empty(layer.m, layer.n, dtype=layer.end.out))
    setattr(made if missing in ("x", "weight") else made.epilogue, missing, None)
    needed = missing != "tap_sums" or tile.is_conv
    assert launch(tile, made) == ((3, 0, 0) if needed else (call.OK, 3, 1))
