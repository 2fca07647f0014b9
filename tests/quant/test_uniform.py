"""Uniform quantisation: the integer grids, what they represent exactly, how far off they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.quant.uniform import (
    affine_parameters,
    dequantize,
    integer_range,
    per_channel,
    quantize,
    weight_range,
)

BITS = st.integers(2, 16)
FLOATS = st.floats(-1e4, 1e4, width=32)
quick = settings(max_examples=200, deadline=None, derandomize=True)


def restored(x: Tensor, low: float, high: float, bits: int, symmetric: bool) -> tuple[Tensor, ...]:
    """x through its integers, and the scale and zero point of [low, high]."""
    scale, zero = affine_parameters(torch.tensor(low), torch.tensor(high), bits, symmetric)
    q = quantize(x, scale, zero, *integer_range(bits))
    return dequantize(q, scale, zero), q, scale, zero


@quick
@given(st.lists(FLOATS, min_size=1, max_size=30), BITS, st.booleans())
def test_inside_the_range_the_error_is_at_most_half_a_step(
    values: list[float], bits: int, symmetric: bool
) -> None:
    x = torch.tensor(values)
    back, _, scale, _ = restored(x, float(x.min()), float(x.max()), bits, symmetric)
    noise = 1.01 + 2**bits * 2.0**-23  # float32 holds x / scale to that many steps
    assert ((x - back).abs() <= scale / 2 * noise).all()


@quick
@given(FLOATS, FLOATS, BITS, st.booleans())
def test_zero_is_always_exact(a: float, b: float, bits: int, symmetric: bool) -> None:
    back, q, scale, zero = restored(torch.zeros(1), min(a, b), max(a, b), bits, symmetric)
    assert back == 0
    assert q == zero == zero.round()
    assert scale > 0
    low, high = integer_range(bits)
    assert low <= zero <= high


@quick
@given(st.lists(FLOATS, min_size=1, max_size=30), FLOATS, FLOATS, BITS, st.booleans())
def test_integers_never_leave_the_range(
    values: list[float], a: float, b: float, bits: int, symmetric: bool
) -> None:
    _, q, _, _ = restored(torch.tensor(values), min(a, b), max(a, b), bits, symmetric)
    low, high = integer_range(bits)
    assert ((q >= low) & (q <= high)).all()
    assert torch.equal(q, q.round())


@quick
@given(FLOATS, FLOATS, BITS)
def test_symmetric_quantisers_have_no_zero_point_and_cover_the_larger_end(
    a: float, b: float, bits: int
) -> None:
    scale, zero = affine_parameters(torch.tensor(min(a, b)), torch.tensor(max(a, b)), bits, True)
    assert zero == 0
    assert float(scale) * integer_range(bits)[1] >= max(abs(a), abs(b)) * (1 - 1e-6)


@quick
@given(st.integers(1, 6), BITS, st.booleans(), st.integers(0, 2**31))
def test_ranges_of_channels_do_not_affect_each_other(
    channels: int, bits: int, symmetric: bool, seed: int
) -> None:
    x = torch.randn(channels, 9, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-3, 3, channels)[:, None]
    scale, zero = affine_parameters(x.amin(1), x.amax(1), bits, symmetric)
    columns = per_channel(scale, 2, 0), per_channel(zero, 2, 0)
    together = dequantize(quantize(x, *columns, *integer_range(bits)), *columns)
    for row, values in enumerate(x):
        alone, *_ = restored(values, float(values.min()), float(values.max()), bits, symmetric)
        assert torch.equal(together[row], alone)


@quick
@given(st.integers(-127, 127), st.floats(2**-10, 2**10, width=32))
def test_what_is_on_the_grid_stays(q: int, step: float) -> None:
    scale = torch.tensor(step)
    x = dequantize(torch.tensor(q), scale, 0.0)
    assert quantize(x, scale, 0.0, *integer_range(8)) == q


@pytest.mark.parametrize("bits", range(2, 17))
def test_b_bits_span_2_to_the_b_integers(bits: int) -> None:
    low, high = integer_range(bits)
    assert high - low + 1 == 2**bits
    assert low == -high - 1
    assert integer_range(bits, narrow=True) == (low + 1, high)


@pytest.mark.parametrize(
    ("bits", "expected"), [(2, (-2, 1)), (4, (-8, 7)), (5, (-15, 15)), (8, (-127, 127))]
)
def test_weights_above_4_bits_leave_out_the_lowest_integer(
    bits: int, expected: tuple[int, int]
) -> None:
    assert weight_range(bits) == expected


def test_symmetric_8_bit_weights_represent_both_ends_exactly() -> None:
    scale = torch.tensor(1.0) / weight_range(8)[1]
    q = quantize(torch.tensor([-1.0, 0.0, 1.0, 5.0, -5.0]), scale, 0.0, *weight_range(8))
    assert q.tolist() == [-127, 0, 127, 127, -127]
    assert torch.equal(dequantize(q, scale, 0.0)[:3], torch.tensor([-1.0, 0.0, 1.0]))


def test_4_bit_weights_clamp_the_positive_end_first() -> None:
    scale = torch.tensor(1.0)
    q = quantize(torch.tensor([-9.0, -8.0, 7.0, 8.0]), scale, 0.0, *weight_range(4))
    assert q.tolist() == [-8, -8, 7, 7]


def test_activations_use_the_lowest_integer_as_well() -> None:
    _, q, _, zero = restored(torch.tensor([-1.0, 0.0, 1.55]), -1.0, 1.55, 8, symmetric=False)
    assert q.tolist() == [-128, -28, 127]
    assert zero == -28


def test_one_sided_ranges_are_stretched_to_zero() -> None:
    _, q, scale, zero = restored(torch.tensor([0.0, 2.0, 5.1]), 2.0, 5.1, 8, symmetric=False)
    assert zero == -128
    assert scale == pytest.approx(0.02)
    assert q.tolist() == [-128, -28, 127]
    _, q, _, zero = restored(torch.tensor([-5.1, 0.0]), -5.1, -2.0, 8, symmetric=False)
    assert (zero, q.tolist()) == (127, [-128, 127])


def test_halves_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor(1.0), 0.0, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]


def test_the_zero_point_is_added_after_rounding() -> None:
    x = torch.tensor([0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor(1.0), 3.0, -128, 127).tolist() == [3, 5, 5]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_zero_has_a_usable_scale(symmetric: bool) -> None:
    back, _, scale, zero = restored(torch.zeros(3), 0.0, 0.0, 8, symmetric)
    assert scale == 1
    assert torch.isfinite(zero)
    assert torch.equal(back, torch.zeros(3))


def test_ranges_of_half_precision_give_float32_parameters() -> None:
    low, high = torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([3.0]).half()
    scale, zero = affine_parameters(low, high, 8, False)
    assert scale.dtype == zero.dtype == torch.float32
    assert quantize(high, scale, zero, -128, 127).dtype == torch.float32


def test_per_channel_shapes_for_any_axis() -> None:
    values = torch.arange(5.0)
    assert per_channel(values, 4, 0).shape == (5, 1, 1, 1)
    assert per_channel(values, 3, 2).shape == (1, 1, 5)
    assert per_channel(values, 3, 2).flatten().tolist() == values.tolist()
