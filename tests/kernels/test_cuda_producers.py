"""The CUDA producers and weight kernels, compiled by a C++ compiler and run on this CPU."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxquant.errors import OperandError
from fxquant.kernels import jit
from fxquant.kernels.config import Config, TensorInfo
from fxquant.kernels.cuda import launch, nvcc, producers, weights
from fxquant.kernels.machine import Machine
from tests.kernels import cases, producer_properties
from tests.kernels.cuda_on_cpu import compile as on_cpu

needs_compiler = pytest.mark.skipif(jit.find_compiler() is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
ORDERS = {"forwards": 0, "backwards": 1, "strided": 2}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    sources = [on_cpu.SOURCES / "producers.cu", on_cpu.SOURCES / "weights.cu"]
    sources.append(on_cpu.HERE / "numbers.cpp")
    return on_cpu.compiled(sources, tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def emulated(
    monkeypatch: pytest.MonkeyPatch, libraries: dict[str, ctypes.CDLL]
) -> Iterator[Callable[[int], None]]:
    """The faces run on CPU tensors; the value sets the order in which threads take turns."""

    def set_order(order: int) -> None:
        libraries["producers"].fxquant_test_order(order)
        libraries["weights"].fxquant_test_order(order)

    with monkeypatch.context() as patch:
        on_cpu.play_gpu(patch, libraries)
        yield set_order
    set_order(0)
    producers.library.cache_clear()
    weights.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    "holds", producer_properties.PRODUCERS + producer_properties.WEIGHTS, ids=lambda f: f.__name__
)
def test_property(
    holds: Callable[[str], None], emulated: Callable[[int], None], request: pytest.FixtureRequest
) -> None:
    emulated(len(request.node.name) % 3)  # one of the orders, the same every time
    holds("cpu")


@needs_compiler
def test_the_order_of_threads_changes_nothing(emulated: Callable[[int], None]) -> None:
    image = cases.floats(2, 80, 17, 13)
    tokens = cases.floats(5, 1280)
    packed = cases.integers(3, 162, dtype=torch.uint8)
    results = []
    for order in ORDERS.values():
        emulated(order)
        end = (cases.row(), -1, 8, None, None)
        results.append(
            (
                cases.call("group_norm_silu_quantize", "cuda", image, *end, 8, 1e-5, "silu",
                           torch.float32),
                cases.call("layer_norm_quantize", "cuda", tokens, *end, 1e-5, torch.float32),
                weights.unpack_conv(packed, 36, (3, 3), 48),
            )
        )  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_nothing_beyond_a_tensor_is_touched(
    emulated: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors end where the address space does: what reads or writes on ends the program."""
    row, i8, f16 = guarded(cases.row()), torch.int8, torch.float16

    def empty(shape: object, dtype: torch.dtype, device: torch.device) -> Tensor:
        sizes = shape if isinstance(shape, tuple | list | torch.Size) else (shape,)
        return guarded(torch.zeros(sizes, dtype=dtype))

    def empty_strided(
        shape: object, strides: object, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        flat = guarded(torch.zeros(math.prod(shape), dtype=dtype))
        return flat.as_strided(shape, strides)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    for width in (1, 5, 8, 24, 320):
        tokens = guarded(cases.floats(3, 2 * width).to(f16))
        image = guarded(cases.floats(2, 3, 5, width).to(f16)).permute(0, 3, 1, 2)
        affine = guarded(cases.floats(width)), guarded(cases.floats(width))
        producers.quantize(image, row, 0, 8, "silu", i8)
        producers.add_quantize(image, image, row, 0, 8, i8)
        producers.cat_quantize([image, image], row, 0, 8, 1, i8)
        producers.geglu_quantize(tokens, row, 0, 8, "none", i8)
        producers.upsample_quantize(image, row, 0, 8, 2, i8)
        producers.group_norm_silu_quantize(image, row, 0, 8, *affine, 1, 1e-5, "silu", i8)
        producers.layer_norm_quantize(image.permute(0, 2, 3, 1), row, -1, 8, *affine, 1e-5, f16)
        k = 9 * width
        packed = guarded(cases.integers(2, (k + 1) // 2, dtype=torch.uint8))
        weights.unpack_conv(packed, k, (1, 1), 16 * math.ceil(k / 16))
        weights.unpack_conv(packed, width, (3, 3), 16 * math.ceil(width / 16))
        weights.pack_int4(guarded(cases.nibbles(3, width)), 16 * math.ceil(width / 16))


def guarded(x: Tensor) -> Tensor:
    """A copy whose last byte is the last that may be touched."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    kept = page * math.ceil(max(size, 1) / page)
    memory = mmap.mmap(-1, kept + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + kept), page, 0) == 0
    if not size:
        return x
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=kept - size)
    return flat.view(x.shape).copy_(x)


@needs_compiler
def test_sixteen_bit_floats(libraries: dict[str, ctypes.CDLL]) -> None:
    every = torch.arange(65536).to(torch.uint16)
    # Each 16-bit number, the ties beside it, and what is next to those.
    for dtype, name in ((torch.float16, "half"), (torch.bfloat16, "bfloat16")):
        wide = torch.empty(65536)
        getattr(libraries["numbers"], f"{name}_to_float")(*_array(every), _data(wide))
        expected = every.view(dtype).float()
        assert torch.equal(wide.nan_to_num(7.0), expected.nan_to_num(7.0))
        below = 13 if dtype == torch.float16 else 16
        x = (
            expected.view(torch.int32)[:, None]
            + torch.tensor([0, 1, (1 << below - 1) - 1, 1 << below - 1, (1 << below - 1) + 1]).int()
        )
        x = x.view(torch.float32).flatten()
        tiny = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2.0**-13
        x = torch.cat((x, tiny, -tiny, torch.tensor([65519.9, 65520.0, -65520.0, 1e30])))
        narrow = torch.empty(x.numel(), dtype=torch.uint16)
        getattr(libraries["numbers"], f"float_to_{name}")(*_array(x), _data(narrow))
        made, wanted = narrow.view(dtype), x.to(dtype)
        assert torch.equal(made.isnan(), wanted.isnan())
        assert torch.equal(
            made.nan_to_num(7.0).view(torch.int16), wanted.nan_to_num(7.0).view(torch.int16)
        )


@needs_compiler
def test_both_ways_to_quantise_agree(libraries: dict[str, ctypes.CDLL]) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-120, 120, (400,), generator=generator).double()
    scales = torch.rand(400, generator=generator).double().add(1) * 2**exponents
    for scale in scales.tolist():
        row = torch.tensor([[scale, -7.0]])
        ties = torch.randint(-260, 260, (500,), generator=generator) + 0.5
        x = (ties.double() * row[0, 0].double()).float()
        x = torch.cat(
            [(x.view(torch.int32) + ulp).view(torch.float32) for ulp in (-2, -1, 0, 1, 2)]
        )
        plain, quick = (torch.empty(x.numel(), dtype=torch.int8) for _ in range(2))
        libraries["numbers"].quantise(*_array(x), _data(row), 8, _data(plain), _data(quick))
        assert torch.equal(plain, quick)
        assert torch.equal(
            plain, cases.call("quantize", "reference", x, row, 0, 8, "none", torch.int8)
        )


@needs_compiler
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activations_are_accurate(name: str, libraries: dict[str, ctypes.CDLL]) -> None:
    x = torch.linspace(-12, 12, 20_001)
    y = torch.empty_like(x)
    libraries["numbers"].activate(*_array(x), launch.ACTIVATIONS[name], _data(y))
    functions = torch.nn.functional
    exact = {
        "silu": functions.silu,
        "gelu": functions.gelu,
        "gelu_tanh": lambda v: functions.gelu(v, approximate="tanh"),
    }[name](x.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


@needs_compiler
def test_wrong_arguments_are_refused(emulated: Callable[[int], None]) -> None:
    x, image, row, i8 = cases.floats(2, 6), cases.floats(2, 6, 3, 3), cases.row(), torch.int8
    strided, bytes_ = torch.zeros(3, 4)[:, :2], torch.zeros(3, 4).byte()
    wrong: dict[str, Callable[[], Tensor]] = {
        "x is torch.float64": lambda: producers.quantize(x.double(), row, 0, 8, "none", i8),
        "does not write torch.uint8": lambda: producers.quantize(x, row, 0, 8, "none", torch.uint8),
        "quantiser 3 is not": lambda: producers.quantize(x, row, 3, 8, "none", i8),
        "quantiser -1 does not write": lambda: producers.quantize(x, row, -1, 8, "none", i8),
        "contiguous float32": lambda: producers.quantize(x, row.double(), 0, 8, "none", i8),
        r"\[n, 2\]": lambda: producers.quantize(x, strided, 0, 8, "none", i8),
        "2 to 8 bits": lambda: producers.quantize(x, row, 0, 9, "none", i8),
        "activation 'relu'": lambda: producers.quantize(x, row, 0, 8, "relu", i8),
        "equal shapes": lambda: producers.add_quantize(x, x[:1], row, 0, 8, i8),
        "b is torch.int32": lambda: producers.add_quantize(x, x.int(), row, 0, 8, i8),
        "even last size": lambda: producers.geglu_quantize(x[:, :3], row, 0, 8, "none", i8),
        "activation 'erf'": lambda: producers.geglu_quantize(x, row, 0, 8, "erf", i8),
        "equal but for size 0": lambda: producers.cat_quantize([x, x[:, :2]], row, 0, 8, 0, i8),
        "is enlarged": lambda: producers.upsample_quantize(image, row, 0, 8, 0, i8),
        "do not make 4 groups": lambda: producers.group_norm_silu_quantize(
            image, row, 0, 8, None, None, 4, 1e-5, "silu", i8
        ),
        "none or silu": lambda: producers.group_norm_silu_quantize(
            image, row, 0, 8, None, None, 3, 1e-5, "gelu", i8
        ),
        r"weight has shape \(5,\)": lambda: producers.group_norm_silu_quantize(
            image, row, 0, 8, cases.floats(5), None, 3, 1e-5, "silu", i8
        ),
        r"bias has shape \(5,\)": lambda: producers.layer_norm_quantize(
            x, row, 0, 8, None, cases.floats(5), 1e-5, i8
        ),
        "quantiser 0 does not write": lambda: producers.layer_norm_quantize(
            x, row, 0, 8, None, None, 1e-5, torch.float16
        ),
        "take uint8": lambda: weights.unpack_conv(row.byte(), 7, (1, 1), 8),
        "weights are contiguous": lambda: weights.unpack_conv(bytes_[:, :2], 4, (1, 1), 4),
        "do not fit 2 columns": lambda: weights.unpack_conv(row.byte(), 4, (1, 1), 2),
        "contiguous int8": lambda: weights.pack_int4(x, 6),
        "an even number": lambda: weights.pack_int4(x.to(i8), 7),
    }
    for message, run in wrong.items():
        with pytest.raises(OperandError, match=message):
            run()
        with pytest.raises(ValueError, match=message):
            run()


def test_tensors_elsewhere_are_refused() -> None:
    """Before a library is looked for: this needs no GPU."""
    x, row = cases.floats(2, 6), cases.row()
    with pytest.raises(OperandError, match="all tensors go on one GPU; x is on cpu"):
        producers.quantize(x, row, 0, 8, "none", torch.int8)
    with pytest.raises(OperandError, match="all tensors go on one GPU; packed is on cpu"):
        weights.unpack_conv(row.byte(), 4, (1, 1), 4)


@needs_compiler
def test_statuses(libraries: dict[str, ctypes.CDLL], emulated: Callable[[int], None]) -> None:
    """The library itself refuses what a caller of the C interface gets wrong."""
    library, row = producers.library(CPU), cases.row()
    x, out = cases.floats(64), torch.zeros(64, dtype=torch.int8)
    step = (row.data_ptr(), 0, 8)

    def quantize(
        at: int = x.data_ptr(), type_: int = 1, rows: int = 1, to: int | None = out.data_ptr(),
        step: tuple[int | None, int, int] = step, activation: int = 0,
    ) -> int:  # fmt: skip
        return library.fxquant_quantize(at, type_, rows, 8, to, 8, *step, activation, None)

    assert quantize() == 0
    assert quantize(rows=0, to=None) == 0
    assert quantize(rows=-1) == quantize(to=None) == quantize(activation=9) == 2
    assert quantize(step=(None, 0, 8)) == quantize(step=(row.data_ptr(), 0, 1)) == 2
    assert quantize(at=x.data_ptr() + 1) == 3
    assert quantize(type_=4) == quantize(type_=0) == 4
    sizes = (2, 16, 64, 8)
    needed = library.fxquant_group_norm_workspace(*sizes)
    assert needed > 0
    assert library.fxquant_group_norm_workspace(2, 16, 64, 7) == -1
    image, space = cases.floats(*sizes[:3]), torch.zeros(needed, dtype=torch.uint8)

    def group_norm(bytes_: int, shift: int = 0) -> int:
        return library.fxquant_group_norm(
            image.data_ptr(), 1, *sizes, None, None, 1, 1e-5, 0, image.data_ptr(), 1, None, -1, 8,
            space.data_ptr() + shift, bytes_, None,
        )  # fmt: skip

    assert group_norm(needed - 64) in (0, 5)  # the bound is for any alignment
    assert group_norm(16) == 5
    assert group_norm(needed, shift=4) == 3
    assert group_norm(needed) == 0


@needs_compiler
def test_a_failed_launch_is_named(
    libraries: dict[str, ctypes.CDLL], emulated: Callable[[int], None]
) -> None:
    args = (cases.floats(2, 3), cases.row(), 0, 8, "none", torch.int8)
    libraries["producers"].fxquant_test_fail()
    with pytest.raises(launch.KernelLaunchError, match="invalid configuration argument"):
        producers.quantize(*args)
    assert producers.quantize(*args).any()


def config(
    op: str = "quantize",
    dtype: torch.dtype = torch.float16,
    out: torch.dtype = torch.int8,
    device: str = "cuda",
    units: tuple[str, ...] = ("producers", "weights"),
) -> Config:
    machine = Machine("x86_64", frozenset(), None, "9.0", frozenset(units))
    info = TensorInfo(dtype, (None, 16))
    name = {"cat_quantize": "xs", "add_quantize": "a"}.get(op, "x")
    return Config(op, {name: info}, {"dtype": out}, machine, device)


def test_why_not() -> None:
    assert all(producers.why_not(config(op)) is None for op in cases.PRODUCERS)
    for capability in (None, "7.5", "12.0"):
        other = replace(config(), machine=replace(config().machine, cuda=capability))
        said = f"8.0 to 8.9 and 9.0, this one has {capability or 'none'}"
        assert said in str(producers.why_not(other))
    assert str(producers.why_not(config(units=()))).endswith(
        "build it with `fxquant kernels build`"
    )
    for op in cases.PRODUCERS:
        assert "not torch.float64" in str(producers.why_not(config(op, dtype=torch.float64)))
        assert "torch.uint8" in str(producers.why_not(config(op, out=torch.uint8)))
    assert producers.why_not(config("layer_norm_quantize", out=torch.bfloat16)) is None
    assert "torch.bfloat16" in str(producers.why_not(config("quantize", out=torch.bfloat16)))


@pytest.mark.slow
@pytest.mark.skipif(nvcc.find() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", ["producers.cu", "weights.cu"])
def test_kernels_stay_in_registers(source: str, tmp_path: Path) -> None:
    command = [
        str(nvcc.find()), "-std=c++17", "-O3", "-arch=sm_80", "-shared", "-Xptxas", "-v",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Werror", "all-warnings",
        str(on_cpu.SOURCES / source), "-o", str(tmp_path / "library.so"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(frames) > 3
    assert set(frames) == {("0", "0")}


def _array(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return _data(x), ctypes.c_int64(x.numel())


def _data(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
