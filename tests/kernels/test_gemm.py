"""Our integer GEMM and convolution: what test_integers and test_epilogues do not reach."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.kernels import jit, ops, pack, reference
from fxquant.kernels.config import Config, TensorInfo
from fxquant.kernels.int4 import pack_int4
from fxquant.kernels.machine import LEVELS, Machine, cpu_features, detect
from fxquant.kernels.x86 import gemm
from tests.kernels import cases
from tests.kernels.test_integers import filled

pytestmark = pytest.mark.skipif(
    detect().arch != "x86_64" or jit.find_compiler() is None,
    reason="the kernels are compiled for x86_64",
)
bounded = settings(max_examples=100, deadline=None, derandomize=True, database=None)
OUTPUTS = {
    "f32": (-1, 8, torch.float32),
    "bf16": (-1, 8, torch.bfloat16),
    "u8": (1, 8, torch.uint8),
    "i4": (1, 4, torch.int8),
}
OPTIONAL = {"avx_vnni", "avx512_vnni", "avx512_bf16"}  # a level does without those it lacks


def kernel(bits: int) -> str:
    return "gemm_int4" if bits <= 4 else "gemm"


def check(op: str, args: tuple[object, ...]) -> Tensor:
    """Our result, found to be the reference's in values and memory order."""
    expected = cases.call(op, "reference", *args)
    actual = cases.call(op, kernel(args[6]), *args)
    cases.assert_near(actual, expected)
    assert actual.stride() == expected.stride()
    return actual


@bounded
@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 37), st.integers(5, 15), st.integers(5, 15)),
    n=st.integers(1, 70),
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    kind=st.sampled_from(["random", "low", "high", "alternating"]),
    zero_point=st.sampled_from([-128, -5, 0, 127]),
    bits=st.sampled_from([8, 5, 4, 2]),
)
def test_convolutions_are_exact(
    image: tuple[int, ...],
    n: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, ...],
    kind: str,
    zero_point: int,
    bits: int,
) -> None:
    natural = filled(kind, n, image[1], *kernel_size, seed=n, bits=bits)
    weight = pack_int4(natural) if bits <= 4 else natural
    x, row = cases.integers(*image, dtype=torch.uint8), cases.row((1.0, float(zero_point)))
    where = (kernel_size, stride, padding, dilation, 1)
    expected = reference.accumulate_conv2d(x, row, 0, weight, bits, *where)
    end = (None, "none", None, -1, 8, torch.float32)
    y = gemm.conv2d(x, row, 0, weight, torch.ones(n), None, bits, *where, *end)
    assert torch.equal(y.long(), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [6148, 13001])
def test_a_deep_sum_is_exact_slice_by_slice(k: int, bits: int) -> None:
    """The groups are summed in blocks; a slice's sum is below 2^24, so a float shows it."""
    x, row = torch.full((29, k), 255, dtype=torch.uint8), cases.row((1.0, -128.0))
    for begin in range(0, k, 499):
        natural = torch.zeros(40, k, dtype=torch.int8)
        part = natural[:, begin : begin + 499]
        part.copy_(filled("random", *part.shape, seed=begin, bits=bits))
        weight = pack_int4(natural) if bits == 4 else natural
        end = (torch.ones(40), None, bits, "none", None, -1, 8, torch.float32)
        expected = natural.sum(1, dtype=torch.int64) * 255
        assert torch.equal(gemm.linear(x, row, 0, weight, *end).long(), expected.expand(29, 40))


@pytest.mark.parametrize("bits", [8, 4])
def test_large_layers_take_every_path(bits: int) -> None:
    """More rows than a chunk, more channels than a panel, more groups than a block."""
    for out in OUTPUTS.values():
        check("linear", cases.linear_args(batch=(3, 401), k=68, n=83, bits=bits, out=out))
        check("linear", cases.linear_args(batch=(25,), k=6500, n=70, bits=bits, out=out))
        check(
            "conv2d",
            cases.conv2d_args(
                c=8, n=64, size=(37, 21), bits=bits, channel_add=cases.floats(2, 64), out=out
            ),
        )
    deep = cases.conv2d_args(c=812, n=33, size=(5, 5), bits=bits, residual=torch.bfloat16)
    check("conv2d", deep)


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("activation", ["geglu", "geglu_tanh"])
@pytest.mark.parametrize("bits", [8, 4])
def test_geglu(bits: int, activation: str, out: str) -> None:
    for n in (2, 34, 64, 190):
        args = cases.linear_args(
            batch=(2, 13), k=31, n=n, bits=bits, activation=activation, out=OUTPUTS[out]
        )
        assert check("linear", args).shape == (2, 13, n // 2)


@pytest.mark.parametrize("name", ["gemm", "reference"])
def test_the_fake_geglu_is_like_the_real_one(name: str) -> None:
    assert "linear" in ops.SCHEMAS  # which the import registered
    args = (*cases.linear_args(n=34, activation="geglu", out=OUTPUTS["u8"]), name)
    torch.library.opcheck(torch.ops.fxquant.linear.default, args)


def test_a_dilated_convolution_has_its_epilogue() -> None:
    check("conv2d", cases.conv2d_args(dilation=2, activation="silu", residual=torch.float32))


def test_what_is_not_finite_is_the_lowest_integer() -> None:
    args = list(cases.linear_args(n=40, residual=torch.float32, out=(1, 8, torch.uint8)))
    args[8] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38]).repeat(2, 5, 10)
    check("linear", tuple(args))


def test_tensors_in_another_memory_order() -> None:
    x, row, index, weight, *rest = cases.linear_args(residual=torch.float32)
    rest[4] = rest[4].mT.contiguous().mT
    rest[0] = torch.stack((rest[0], rest[0]), 1)[:, 0]
    check("linear", (x.mT.contiguous().mT, row, index, weight.T.contiguous().T, *rest))


def test_no_rows() -> None:
    assert gemm.linear(*cases.linear_args(batch=(0, 5))).shape == (0, 5, 17)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layers() -> list[tuple[str, tuple[object, ...]]]:
    """Layers that are large enough for several threads."""
    u8 = (1, 8, torch.uint8)
    return [
        ("linear", cases.linear_args(batch=(2, 350), k=256, n=70)),
        ("linear", cases.linear_args(batch=(7,), k=4000, n=200, bits=4)),
        ("linear", cases.linear_args(batch=(40,), k=320, n=640, activation="geglu", out=u8)),
        ("conv2d", cases.conv2d_args(c=35, n=40, size=(30, 31), residual=torch.bfloat16)),
        ("conv2d", cases.conv2d_args(c=64, n=96, size=(20, 9), bits=4, stride=2, out=u8)),
    ]


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    for op, args in layers():
        torch.set_num_threads(1)
        alone = check(op, args)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(cases.call(op, kernel(args[6]), *args), alone)


def test_concurrent_calls() -> None:
    work = layers()
    expected = [cases.call(op, kernel(args[6]), *args) for op, args in work]
    wrong: list[str] = []

    def use(order: int) -> None:
        for i in range(20 * len(work)):
            op, args = work[order * i % len(work)]
            if not torch.equal(cases.call(op, kernel(args[6]), *args), expected[order * i % 5]):
                wrong.append(op)

    pair = [threading.Thread(target=use, args=(order,)) for order in (1, 2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("level", LEVELS)
def test_older_cpus(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is compiled for what FXQUANT_CPU leaves, and gives the same sums."""
    if not LEVELS[level] - OPTIONAL <= cpu_features():
        pytest.skip(f"this CPU has no {level}")
    monkeypatch.setenv("FXQUANT_CPU", level)
    masked = gemm.library.__wrapped__()
    monkeypatch.setattr(gemm, "library", lambda: masked)
    for bits in (8, 4):
        test_a_deep_sum_is_exact_slice_by_slice(6148, bits)
        test_large_layers_take_every_path(bits)
        for activation in ("geglu", "geglu_tanh"):
            test_geglu(bits, activation, "u8")
    for residual in (None, torch.float32, torch.bfloat16):
        for activation in ("silu", "gelu", "gelu_tanh"):
            check("linear", cases.linear_args(n=50, activation=activation, residual=residual))
    test_what_is_not_finite_is_the_lowest_integer()


def test_levels_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    native = gemm.library()
    monkeypatch.setenv("FXQUANT_CPU", "generic")
    assert gemm.library.__wrapped__()._name != native._name


def test_a_weight_may_change() -> None:
    args = cases.linear_args(n=34)
    first = check("linear", args)
    args[3].neg_()
    assert not torch.allclose(check("linear", args), first)


def test_a_weight_may_be_used_with_and_without_geglu() -> None:
    args = cases.linear_args(n=34)
    for activation in ("none", "geglu", "none", "geglu_tanh"):
        check("linear", (*args[:7], activation, *args[8:]))


def test_a_pack_is_prepared_and_freed_with_its_weight() -> None:
    gc.collect()
    before = pack.count()
    args = cases.conv2d_args()
    prepared = gemm.prepare_conv2d(args[3], 8, 11, [3, 3])
    cases.call("conv2d", "gemm", *args)
    assert gemm.prepare_conv2d(args[3], 8, 11, [3, 3]) is prepared
    assert pack.count() == before + 1
    del args
    gc.collect()
    assert pack.count() == before


def test_four_bit_weights_stay_packed() -> None:
    eight = gemm.prepare_linear(cases.integers(64, 256), 8, 256)
    four = gemm.prepare_linear(pack_int4(cases.nibbles(64, 256)), 4, 256)
    assert 2 * four.weight.numel() == eight.weight.numel() == 64 * 256


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, row, index, weight, *rest = cases.linear_args()
    with pytest.raises(ValueError, match="24 weights per channel"):
        gemm.linear(x, row, index, weight[:, :-1], *rest)
    with pytest.raises(ValueError, match="12 weights per channel"):
        gemm.linear(x[..., ::2], row, index, weight, *rest)
    with pytest.raises(ValueError, match="uint8"):
        gemm.linear(x.view(torch.int8), row, index, weight, *rest)
    with pytest.raises(ValueError, match="float16"):
        gemm.linear(x, row, index, weight, *rest[:-1], torch.float16)
    with pytest.raises(ValueError, match="quantiser 3"):
        gemm.linear(x, row, 3, weight, *rest)
    for n, residual in ((34, torch.float32), (17, None)):
        with pytest.raises(ValueError, match="geglu takes no residual, and an even number"):
            gemm.linear(*cases.linear_args(n=n, residual=residual, activation="geglu"))
    with pytest.raises(ValueError, match="2 groups"):
        gemm.conv2d(*cases.conv2d_args(c=8, n=8, groups=2))


AMX = Machine("x86_64", LEVELS["vnni"] | {"amx_int8"}, "c++")


@pytest.mark.parametrize(
    ("machine", "dtype", "options", "sentence"),
    [
        ("x86-generic", torch.uint8, {}, None),
        ("x86-vnni", torch.uint8, {"activation": "geglu"}, None),
        ("x86-vnni", torch.int8, {}, "uint8, not torch.int8"),
        ("x86-vnni", torch.uint8, {"weight_bits": 4}, "5 to 8 bits, not 4"),
        ("x86-vnni", torch.uint8, {"groups": 4}, "no grouped convolution (4 groups)"),
        ("x86-vnni", torch.uint8, {"out_dtype": torch.float16}, "does not write torch.float16"),
        ("x86-vnni-no-compiler", torch.uint8, {}, "no C++ compiler"),
        ("arm64", torch.uint8, {}, "compiled for x86_64, this is arm64"),
        (AMX, torch.uint8, {}, "the CPU has AMX"),
        (AMX, torch.uint8, {"activation": "geglu"}, "the CPU has AMX"),
    ],
)
def test_why_not(
    machine: str | Machine, dtype: torch.dtype, options: dict[str, object], sentence: str | None
) -> None:
    here = Machine.named(machine) if isinstance(machine, str) else machine
    known = {"weight_bits": 8, "groups": 1, "activation": "none"} | options
    reason = gemm.why_not(Config("linear", {"x": TensorInfo(dtype, (None, 64))}, known, here))
    assert reason is None if sentence is None else sentence in str(reason)
