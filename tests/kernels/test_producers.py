"""The fused C++ producers against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.kernels import jit
from fxquant.kernels.machine import cpu_features, detect
from fxquant.kernels.x86 import producers
from tests.kernels import cases

pytestmark = pytest.mark.skipif(
    detect().arch != "x86_64" or jit.find_compiler() is None,
    reason="the producers are compiled for x86_64",
)
bounded = settings(max_examples=300, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
batches = st.sampled_from([1, 3, 64])
values = st.sampled_from(["ordinary", "large", "zero", "negative"])
targets = st.sampled_from([torch.uint8, torch.int8])
NEEDS = {"generic": set(), "avx2": {"avx2"}, "avx512": {"avx512f", "avx512bw", "avx512vl"}}
layouts = st.sampled_from(["channels_last", "contiguous", "strided"])


def filled(kind: str, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = cases.floats(*shape, seed=seed)
    x = {"ordinary": 2 * x, "large": 1e6 * x, "zero": 0 * x, "negative": -3 - x.abs()}[kind]
    return x.to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory order; strided ones have gaps between them."""
    if layout == "contiguous":
        return x
    if layout == "strided":
        return torch.stack((x, x), dim=-1)[..., 0]
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def check(op: str, *args: object) -> Tensor:
    """The fused result, found to be the reference's in values and memory order."""
    expected = cases.call(op, "reference", *args)
    actual = cases.call(op, "fused", *args)
    cases.assert_near(actual, expected)
    assert actual.stride() == expected.stride()
    # One rounding: a bfloat16 differs only where float32 noise moved it over a tie.
    assert actual.dtype != torch.bfloat16 or (actual != expected).double().mean() <= 0.02
    return actual


@bounded
@given(
    shape=st.sampled_from(
        [(1,), (7, 3), (2, 5, 33), (3, 17, 5, 7), (64, 3, 2, 2), (2, 3, 4, 5, 6)]
    ),
    activation=st.sampled_from(["none", "silu", "gelu", "gelu_tanh"]),
    bits=st.sampled_from([4, 8]),
    dtype=dtypes,
    target=targets,
    kind=values,
    layout=layouts,
)
def test_quantize(
    shape: tuple[int, ...],
    activation: str,
    bits: int,
    dtype: torch.dtype,
    target: torch.dtype,
    kind: str,
    layout: str,
) -> None:
    x = filled(kind, *shape, dtype=dtype)
    x = laid_out(x, layout) if x.dim() > 1 else x
    check("quantize", x, cases.row(), 1, bits, activation, target)


def test_quantize_rounds_as_the_reference_does() -> None:
    halves = torch.arange(-300, 300) / 2
    for step in ((0.5, 0.0), (0.5, 3.0), (0.25, -128.0), (1.0, 127.0)):
        args = (halves, cases.row(step), 0, 8, "none", torch.uint8)
        expected = cases.call("quantize", "reference", *args)
        assert torch.equal(cases.call("quantize", "fused", *args), expected)


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_quantize_survives_what_is_not_finite(activation: str) -> None:
    # torch's vectorised GELU makes a NaN of infinity.
    infinite = [] if activation.startswith("gelu") else [math.inf, -math.inf]
    x = torch.tensor([*infinite, math.nan, 3e38, -3e38, 1e-45, -0.0] * 7)
    check("quantize", x, cases.row(), 0, 8, activation, torch.uint8)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_are_accurate(activation: str) -> None:
    """Through a step of 5e-7 whose zero point moves to each value in turn."""
    step = 5e-7
    x = torch.linspace(-6, 6, 501)
    exact = {
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "gelu": lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2))),
        "gelu_tanh": lambda v: (
            0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        ),
    }[activation](x.double())
    for value, wanted in zip(x, exact, strict=True):
        row = cases.row((step, -float(torch.round(wanted / step))))
        q = cases.call("quantize", "fused", value[None], row, 0, 8, activation, torch.int8)
        error = abs((q.double() - row[0, 1].double()) * step - wanted)
        assert error < 1.5e-6 * max(1.0, abs(wanted))


@bounded
@given(
    batch=batches,
    channels=st.sampled_from([(4, 2), (6, 3), (17, 1), (40, 8), (320, 32)]),
    spatial=st.sampled_from([(1,), (7,), (1, 1), (5, 3), (9, 8), (2, 3, 4)]),
    dtype=dtypes,
    kind=values,
    layout=layouts,
    activation=st.sampled_from(["none", "silu"]),
    out=st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bfloat16]),
    affine=st.booleans(),
)
def test_group_norm(
    batch: int,
    channels: tuple[int, int],
    spatial: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    layout: str,
    activation: str,
    out: torch.dtype,
    affine: bool,
) -> None:
    c, groups = channels
    x = laid_out(filled(kind, batch, c, *spatial, dtype=dtype), layout)
    weight = cases.floats(c, seed=1, dtype=dtype) if affine else None
    bias = cases.floats(c, seed=2) if affine else None
    index = -1 if out.is_floating_point else 0
    # A group of equal values divides noise by sqrt(eps): a large eps keeps it small.
    eps = 1e-5 if kind == "ordinary" else 1e-2
    check(
        "group_norm_silu_quantize", x, cases.row(), index, 8, weight, bias, groups, eps,
        activation, out,
    )  # fmt: skip


@bounded
@given(
    rows=st.sampled_from([(1,), (3,), (64, 2), (2, 3, 5)]),
    width=st.sampled_from([1, 5, 16, 40, 319, 1280]),
    dtype=dtypes,
    kind=values,
    out=st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bfloat16]),
    affine=st.booleans(),
    strided=st.booleans(),
)
def test_layer_norm(
    rows: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    kind: str,
    out: torch.dtype,
    affine: bool,
    strided: bool,
) -> None:
    x = filled(kind, *rows, width, dtype=dtype)
    x = laid_out(x, "strided") if strided else x
    weight = cases.floats(width, seed=1, dtype=dtype) if affine else None
    bias = cases.floats(width, seed=2) if affine else None
    index = -1 if out.is_floating_point else 0
    check("layer_norm_quantize", x, cases.row(), index, 8, weight, bias, 1e-5, out)


@pytest.mark.parametrize("mean", [0.0, 1000.0, -30000.0, 1e6])
def test_norms_of_large_means_are_accurate(mean: float) -> None:
    """Measured against float64, with the first value far off: it is no good pivot."""
    x = mean + cases.floats(2, 320, 40, 30)
    x[0, 0, 0, 0] += 100
    float_out = (cases.row(), -1, 8, None, None)
    y = cases.call("group_norm_silu_quantize", "fused", x, *float_out, 32, 1e-5, "none", x.dtype)
    exact = torch.nn.functional.group_norm(x.double(), 32, eps=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-6)
    tokens = x.reshape(-1, 1200)
    y = cases.call("layer_norm_quantize", "fused", tokens, *float_out, 1e-5, x.dtype)
    exact = torch.nn.functional.layer_norm(tokens.double(), (1200,), eps=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-6)


def test_norms_sample_what_is_not_typical() -> None:
    """What the C++ makes its pivots of is far off: positions of an image, or a row's start."""
    x = cases.floats(1, 32, 64, 64)
    x.flatten(2)[..., [64 * r + 37 * r % 64 for r in range(64)]] += 1000
    float_out = (cases.row(), -1, 8, None, None)
    y = cases.call("group_norm_silu_quantize", "fused", x, *float_out, 4, 1e-5, "none", x.dtype)
    exact = torch.nn.functional.group_norm(x.double(), 4, eps=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=2e-5, atol=2e-5)
    tokens = cases.floats(9, 5120)
    tokens[:, :64] += 1000
    y = cases.call("layer_norm_quantize", "fused", tokens, *float_out, 1e-5, x.dtype)
    exact = torch.nn.functional.layer_norm(tokens.double(), (5120,), eps=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=2e-5, atol=2e-5)


@bounded
@given(
    rows=st.sampled_from([(1,), (3,), (64, 2), (2, 3, 5)]),
    width=st.sampled_from([1, 5, 16, 37, 1280]),
    approximate=st.sampled_from(["none", "tanh"]),
    dtype=dtypes,
    kind=values,
    target=targets,
    strided=st.booleans(),
)
def test_geglu(
    rows: tuple[int, ...],
    width: int,
    approximate: str,
    dtype: torch.dtype,
    kind: str,
    target: torch.dtype,
    strided: bool,
) -> None:
    x = filled(kind, *rows, 2 * width, dtype=dtype)
    x = laid_out(x, "strided") if strided else x
    check("geglu_quantize", x, cases.row(), 0, 8, approximate, target)


@bounded
@given(
    batch=batches,
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dim=st.sampled_from([0, 1, 2, 3, -1]),
    kinds=st.lists(st.tuples(dtypes, values, layouts), min_size=4, max_size=4),
    target=targets,
)
def test_cat(
    batch: int,
    widths: list[int],
    dim: int,
    kinds: list[tuple[torch.dtype, str, str]],
    target: torch.dtype,
) -> None:
    parts = []
    for seed, (width, (dtype, kind, layout)) in enumerate(zip(widths, kinds, strict=False)):
        shape = [batch, 3, 4, 5]
        shape[dim] = width
        parts.append(laid_out(filled(kind, *shape, dtype=dtype, seed=seed), layout))
    check("cat_quantize", parts, cases.row(), 0, 8, dim, target)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_cat_of_tokens(dim: int) -> None:
    x = cases.floats(2, 7, 5)
    q = check("cat_quantize", [x, 2 * x, x], cases.row(), 0, 8, dim, torch.uint8)
    assert q.shape[dim] == 3 * x.shape[dim]


@bounded
@given(
    shape=st.tuples(batches, st.integers(1, 35), st.integers(1, 6), st.integers(1, 6)),
    factor=st.integers(1, 3),
    dtype=dtypes,
    kind=values,
    layout=layouts,
    target=targets,
)
def test_upsample(
    shape: tuple[int, ...],
    factor: int,
    dtype: torch.dtype,
    kind: str,
    layout: str,
    target: torch.dtype,
) -> None:
    x = laid_out(filled(kind, *shape, dtype=dtype), layout)
    check("upsample_quantize", x, cases.row(), 0, 8, factor, target)


@bounded
@given(
    shape=st.sampled_from([(1,), (3, 7), (2, 3, 5), (1, 17, 5, 3), (64, 4, 3, 3)]),
    kinds=st.tuples(values, values),
    dtypes_=st.tuples(dtypes, dtypes),
    target=targets,
)
def test_add(
    shape: tuple[int, ...],
    kinds: tuple[str, str],
    dtypes_: tuple[torch.dtype, torch.dtype],
    target: torch.dtype,
) -> None:
    a = filled(kinds[0], *shape, dtype=dtypes_[0])
    b = filled(kinds[1], *shape, dtype=dtypes_[1], seed=1)
    check("add_quantize", a, b, cases.row(), 2, 8, target)


def test_add_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        cases.call("add_quantize", "fused", *(cases.floats(2, 3), cases.floats(3)), cases.row(),
                   0, 8, torch.uint8)  # fmt: skip


def test_nothing_at_all() -> None:
    tail = (cases.row(), 0, 8)
    for op, extra in (
        ("quantize", ("silu",)),
        ("upsample_quantize", (2,)),
        ("group_norm_silu_quantize", (None, None, 2, 1e-5, "none")),
        ("layer_norm_quantize", (None, None, 1e-5)),
        ("geglu_quantize", ("none",)),
    ):
        for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
            assert (
                cases.call(op, "fused", torch.empty(shape), *tail, *extra, torch.uint8).numel() == 0
            )
    parts = [torch.empty(0, 8, 4, 4)] * 2
    assert cases.call("cat_quantize", "fused", parts, *tail, 1, torch.uint8).shape == (0, 16, 4, 4)


def test_other_inputs_are_refused() -> None:
    x = cases.floats(2, 3)
    with pytest.raises(ValueError, match="float16"):
        cases.call("quantize", "fused", x.half(), cases.row(), 0, 8, "none", torch.uint8)
    with pytest.raises(ValueError, match="quantiser 3"):
        cases.call("quantize", "fused", x, cases.row(), 3, 8, "none", torch.uint8)
    row = cases.row().double()
    with pytest.raises(ValueError, match="quantiser 0"):
        cases.call("quantize", "fused", x, row, 0, 8, "none", torch.uint8)


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_older_cpus(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is compiled for what FXQUANT_CPU leaves, and gives the same results."""
    if not NEEDS[level] <= cpu_features():
        pytest.skip(f"this CPU has no {level}")
    native = producers.library()
    monkeypatch.setenv("FXQUANT_CPU", level)
    masked = producers.library.__wrapped__()
    assert masked._name != native._name
    monkeypatch.setattr(producers, "library", lambda: masked)
    test_large_tensors_take_every_path()
    for activation in ("silu", "gelu", "gelu_tanh"):
        test_quantize_survives_what_is_not_finite(activation)
        test_activations_are_accurate(activation)


def test_large_tensors_take_every_path() -> None:
    """Bigger than one block or chunk of the C++, in rows and in columns."""
    row = (cases.row(), 0, 8)
    image = cases.floats(2, 48, 60, 50).to(torch.bfloat16)
    check("quantize", image, *row, "silu", torch.uint8)
    check("quantize", cases.floats(20_001), *row, "none", torch.uint8)
    check("cat_quantize", [image, image.float()], *row, 1, torch.uint8)
    check("cat_quantize", [image, image], *row, 0, torch.uint8)
    check("upsample_quantize", image, *row, 2, torch.uint8)
    check("add_quantize", image, image, *row, torch.uint8)
    affine = (cases.floats(48, seed=1), cases.floats(48, seed=2))
    check("group_norm_silu_quantize", image, *row, *affine, 8, 1e-5, "silu", torch.uint8)
    check("layer_norm_quantize", image.movedim(1, -1), *row, *affine, 1e-5, torch.uint8)
    check("geglu_quantize", cases.floats(2, 700, 96), *row, "none", torch.uint8)
