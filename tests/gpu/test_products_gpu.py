"""Every GEMM and convolution library against the reference, through the Python faces.

Sums are compared exactly: a float32 residual takes the expected ones off, and what is left is a
pattern of small integers that every type of output holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.kernels import dispatch, reference
from fxquant.kernels.cuda import build
from fxquant.kernels.cutlass import gemm
from fxquant.kernels.cutlass.choose import forced
from fxquant.kernels.cutlass.tiles import TILES, Tile
from tests.gpu.products import (
    OUTS,
    Case,
    Gemm,
    Window,
    assert_close,
    assert_same,
    expected,
    on_gpu,
    products_of,
)

GEMM = Gemm(154, 320, 640)
CONV = Window(2, 64, 96, (10, 7))
GEMMS = (
    Gemm(1, 16, 16), Gemm(1, 320, 1280), Gemm(17, 48, 32), Gemm(77, 640, 40), Gemm(128, 128, 128),
    Gemm(129, 272, 100), Gemm(154, 320, 768), Gemm(300, 144, 1296), Gemm(513, 1280, 33),
)  # fmt: skip
CONVS = (
    Window(2, 32, 32, (9, 7)),
    Window(1, 4, 64, (16, 12)),  # the first layer of a UNet
    Window(2, 20, 48, (8, 6), stride=(2, 2), padding=(0, 1, 0, 1)),  # a downsample
    Window(3, 160, 144, (17, 13), stride=(2, 2)),
    Window(2, 64, 80, (5, 5), kernel=(1, 1), padding=(0, 0, 0, 0)),
    Window(2, 96, 32, (9, 6), kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0)),
    Window(1, 48, 16, (1, 1)),  # all taps but one are outside
    Window(2, 32, 32, (11, 9), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Window(1, 32, 16, (7, 8), kernel=(1, 5), padding=(0, 0, 2, 2)),
    Window(2, 32, 16, (6, 9), padding=(2, 0, 1, 2)),
    Window(2, 320, 320, (16, 16)),
)
RAGGED = {"gemm": (Gemm(5, 17, 24), Gemm(130, 7, 48)), "conv": (Window(1, 320, 4, (8, 9)),)}
EPILOGUES: dict[str, dict[str, Any]] = {
    "nothing": {"bias": False},
    "bias": {},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "residual f32": {"residual": torch.float32},
    "residual f16": {"residual": torch.float16},
    "residual bf16": {"residual": torch.bfloat16},
    "another row": {"x_index": 4},
    "all": {"activation": "silu", "residual": torch.float16, "x_index": 2},
}
every_tile = pytest.mark.parametrize("tile", TILES, ids=lambda t: t.name)


@pytest.fixture(autouse=True)
def _tile(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test calls takes its tile; it is skipped if this GPU has no such library."""
    tile: Tile | None = getattr(
        request.node, "callspec", None
    ) and request.node.callspec.params.get("tile")
    if tile is None:
        yield
        return
    if tile.name not in build.available(capability()):
        pytest.skip(f"{tile.name} is not built for this GPU, or not made for it")
    with forced(tile.name):
        yield


def capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def bits_of(tile: Tile) -> dict[str, int]:
    """Of the weights and the activations."""
    return {"s8": {}, "s8s4": {"bits": 4}, "s4": {"bits": 4, "x_bits": 4}}[tile.types]


def base(tile: Tile) -> Case:
    return Case(CONV if tile.is_conv else GEMM, **bits_of(tile))


def run(tile: Tile, case: Case) -> Tensor:
    return call(products_of(tile), case)


def call(products: gemm.Products, case: Case) -> Tensor:
    function: Callable[..., Tensor] = getattr(products, case.op)
    return function(**on_gpu(case.arguments()))


def exact(case: Case) -> tuple[Case, Tensor]:
    """The case with a residual that leaves a pattern of its sums, and that pattern."""
    plain = case.with_(unit=True, bias=False, out="f32", residual=None)
    sums = expected(plain)
    assert sums.abs().max() < 2**24, "float32 holds no such sum"
    zero = case.row()[1, 1] if case.out == "s8" else torch.tensor(0.0)
    pattern = ((torch.arange(sums.numel()) % 41) - 20.0).reshape(sums.shape)
    given = {"residual": pattern - zero - sums}
    return plain.with_(out=case.out, given=given), pattern.to(OUTS[case.out])


def check_sums(tile: Tile, case: Case) -> None:
    made, pattern = exact(case)
    result = run(tile, made)
    assert torch.equal(result.cpu(), pattern), "a sum is wrong"


def test_every_library_made_for_this_gpu_is_built() -> None:
    wanted = {u.name for a in build.to_build(capability()) for u in build.selected(a)}
    missing = wanted - build.available(capability())
    assert not missing, f"{sorted(missing)}: {build.command(capability())}"


@every_tile
def test_sums_are_exact(tile: Tile) -> None:
    for out in tile.outs:
        for shape in CONVS if tile.is_conv else GEMMS:
            if not tile.any_n and shape.n % 16:
                continue
            for index in (0, 3, 4):  # zero points inside and at both ends of the range
                check_sums(tile, Case(shape, **bits_of(tile), out=out, x_index=index))


@every_tile
def test_sums_of_rows_that_are_no_whole_16_bytes_are_exact(tile: Tile) -> None:
    if not tile.any_n:
        pytest.skip("wgmma tiles are not chosen for those")
    for out in tile.outs:
        for shape in RAGGED["conv" if tile.is_conv else "gemm"]:
            check_sums(tile, Case(shape, **bits_of(tile), out=out, x_index=3))


@every_tile
def test_a_small_case_for_a_memory_checker(tile: Tile) -> None:
    shape = Window(1, 20, 16, (5, 3)) if tile.is_conv else Gemm(33, 32, 40)
    check_sums(tile, Case(shape, **bits_of(tile), out=tile.outs[-1], x_index=3))


@every_tile
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_are_the_reference(tile: Tile, epilogue: str) -> None:
    for out in tile.outs:
        case = base(tile).with_(out=out, **EPILOGUES[epilogue])
        check = assert_same if case.activation == "none" else assert_close
        check(run(tile, case), expected(case))


@every_tile
def test_the_time_embedding_is_added(tile: Tile) -> None:
    if not tile.is_conv:
        pytest.skip("linears have none")
    for out in tile.outs:
        case = base(tile).with_(out=out, channel_add=True)
        assert_same(run(tile, case), expected(case))
        full = case.with_(activation="silu", residual=torch.float16)
        assert_close(run(tile, full), expected(full))


@every_tile
def test_fewer_bits_out(tile: Tile) -> None:
    if "s8" not in tile.outs:
        pytest.skip("writes floats")
    for bits in (2, 4, 7):
        case = base(tile).with_(out="s8", out_bits=bits)
        assert_same(run(tile, case), expected(case))


@every_tile
def test_a_replayed_graph_is_an_eager_call(tile: Tile) -> None:
    case = base(tile).with_(out=tile.outs[0], activation="silu")
    arguments = on_gpu(case.arguments())
    function = getattr(products_of(tile), case.op)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function(**arguments)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**arguments)
    arguments["x"].copy_(arguments["x"].flip(0).contiguous())
    arguments["row"][:, 0] *= 2  # the row is read when the graph runs, not when it is made
    graph.replay()
    assert torch.equal(out, function(**arguments))


@every_tile
def test_a_call_waits_for_nothing(tile: Tile) -> None:
    arguments = on_gpu(base(tile).with_(out=tile.outs[0]).arguments())
    function = getattr(products_of(tile), base(tile).op)
    function(**arguments)  # opens the library, prepares the weight
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("products", [gemm.INT8, gemm.INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("x_bits", [8, 4], ids=["a8", "a4"])
def test_the_tile_that_is_chosen(products: gemm.Products, x_bits: int) -> None:
    """4-bit activations by 4-bit weights run so where 4-bit products are not native."""
    bits = 4 if products is gemm.INT4 else 8
    for out in ("f32", "f16", "bf16", "s8"):
        for shape in (*GEMMS, *CONVS, *RAGGED["gemm"], *RAGGED["conv"]):
            case = Case(shape, bits=bits, x_bits=x_bits, out=out, residual=torch.float16)
            assert_same(call(products, case), expected(case))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation", ["geglu", "geglu_tanh"])
def test_geglu(bits: int, activation: str) -> None:
    products = gemm.INT8 if bits == 8 else gemm.INT4
    for out in ("f16", "bf16", "s8"):
        case = Case(GEMM, bits=bits, activation=activation, out=out)
        result, wanted = call(products, case), expected(case)
        if out == "s8":
            assert_close(result, wanted)
        else:  # the product of the halves is of values that were rounded already
            near = 4 * torch.finfo(wanted.dtype).eps
            torch.testing.assert_close(result.cpu(), wanted, rtol=near, atol=near)


def test_no_rows() -> None:
    case = Case(GEMM)
    arguments = on_gpu(case.arguments())
    arguments["x"] = arguments["x"][:0]
    assert gemm.INT8.linear(**arguments).shape == (0, GEMM.n)


def test_tokens_of_several_axes_and_images_that_are_not_channels_last() -> None:
    case = Case(Gemm(2 * 3 * 5, 32, 48))
    arguments = on_gpu(case.arguments())
    arguments["x"] = arguments["x"].reshape(2, 3, 5, 48)
    assert torch.equal(gemm.INT8.linear(**arguments).cpu().reshape(30, 32), expected(case))
    image = Case(CONV, residual=torch.float16)
    plain = {n: v.contiguous() if isinstance(v, Tensor) else v
             for n, v in on_gpu(image.arguments()).items()}  # fmt: skip
    assert_same(gemm.INT8.conv2d(**plain), expected(image))


def test_a_stream_of_its_own() -> None:
    case = Case(CONV)
    arguments = on_gpu(case.arguments())
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        result = gemm.INT8.conv2d(**arguments)
    aside.synchronize()
    assert_same(result, expected(case))


def test_a_weight_packed_on_one_stream_is_there_for_another() -> None:
    case = Case(CONV)
    arguments = on_gpu(case.arguments())
    slow = torch.cuda.Stream()
    slow.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(slow):
        torch.cuda._sleep(10**8)  # long enough for the other to come first, if it could
        channels, kernel = arguments["x"].shape[1], arguments["kernel_size"]
        gemm.INT8.prepare_conv2d(arguments["weight"], 8, channels, kernel)
    assert_same(gemm.INT8.conv2d(**arguments), expected(case))


def test_no_weight_is_packed_into_a_graph() -> None:
    case = Case(GEMM)
    arguments, graph = on_gpu(case.arguments()), torch.cuda.CUDAGraph()
    with pytest.raises(BackendError, match="once before the capture"), torch.cuda.graph(graph):
        gemm.INT8.linear(**arguments)
    assert_same(gemm.INT8.linear(**arguments), expected(case))


@pytest.mark.parametrize("shape", [GEMM, Gemm(3, 24, 40), CONV], ids=["int_mm", "few rows", "conv"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_slower_path(shape: Gemm | Window, bits: int) -> None:
    case = Case(shape, bits=bits, activation="silu", residual=torch.float16)
    result = dispatch.run(case.op, "int_mm")(**on_gpu(case.arguments()))
    wanted = getattr(reference, case.op)(**case.arguments())
    error = (result.cpu().float() - wanted.float()).norm() / wanted.float().norm()
    assert error <= 1e-2
