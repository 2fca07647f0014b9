"""AdaRound: where it starts, its gradients, where it ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.kernels.int4 import unpack_int4
from fxquant.passes.lower.integer_layers import integer_weight
from fxquant.quant.adaround import Rounding, rectified_sigmoid, regulariser, settled
from fxquant.quant.fake_quant import fake_quantize_weight
from fxquant.quant.search import pnorm_weight_scale
from fxquant.quant.uniform import per_channel

BITS = st.sampled_from([2, 3, 4, 8])


def rounding(
    seed: int, bits: int, shape: tuple[int, ...] = (4, 3, 3, 3)
) -> tuple[Rounding, torch.Tensor, torch.Tensor]:
    """A rounding, its weight and its scale."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    scale = pnorm_weight_scale(weight, bits)
    return Rounding.of(weight, scale, bits), weight, scale


@given(st.integers(0, 99), BITS)
@settings(max_examples=20, deadline=None)
def test_training_starts_at_the_float_weight(seed: int, bits: int) -> None:
    r, weight, scale = rounding(seed, bits)
    ratio = weight / per_channel(scale, 4, 0)
    inside = (ratio > r.low) & (ratio < r.high)
    start = r.soft(r.initial_alpha())
    assert torch.allclose(start[inside], weight[inside], atol=1e-5)
    assert torch.allclose(rectified_sigmoid(r.initial_alpha()), r.fraction, atol=1e-5)


@given(st.integers(0, 99), BITS)
@settings(max_examples=20, deadline=None)
def test_nearest_is_the_fake_quantised_weight(seed: int, bits: int) -> None:
    r, weight, scale = rounding(seed, bits)
    assert torch.equal(r.nearest(), fake_quantize_weight(weight, scale, bits))


@given(st.integers(0, 99), BITS)
@settings(max_examples=20, deadline=None)
def test_a_hardened_weight_is_what_the_packed_integers_mean(seed: int, bits: int) -> None:
    r, weight, scale = rounding(seed, bits)
    alpha = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 1))
    hard = r.hard(alpha)
    integers = integer_weight(hard, scale, bits)
    if bits <= 4:
        integers = unpack_int4(integers, weight[0].numel()).reshape(weight.shape)
    expected = (r.down + (alpha >= 0)).clamp(r.low, r.high)
    assert torch.equal(integers.float(), expected)
    assert torch.equal(integers.float() * per_channel(scale, 4, 0), hard)


def test_settled_roundings_have_equal_soft_and_hard_weights() -> None:
    r, weight, _ = rounding(0, 4)
    alpha = torch.where(torch.rand(weight.shape) < 0.5, 8.0, -8.0)
    assert bool(settled(alpha).all())
    assert torch.equal(r.soft(alpha), r.hard(alpha))
    assert float(regulariser(alpha, 2.0)) == 0
    assert not bool(settled(torch.zeros(3)).any())


@pytest.mark.parametrize("sharp", [20.0, 7.0, 2.0])
def test_the_regulariser_peaks_half_way_and_pulls_outward(sharp: float) -> None:
    alpha = torch.tensor([-1.5, 0.0, 1.5], requires_grad=True)
    value = regulariser(alpha, sharp)
    value.backward()
    assert float(regulariser(torch.zeros(1), sharp)) == 1
    assert float(value.detach()) < 3
    assert alpha.grad[0] > 0 > alpha.grad[2], "h must move away from one half"


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gradients_are_those_of_finite_differences(bits: int) -> None:
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = Rounding.of(weight, torch.full((3,), 0.2, dtype=torch.float64), bits)
    start = r.initial_alpha().requires_grad_()
    assert torch.autograd.gradcheck(r.soft, (start,))
    assert torch.autograd.gradcheck(lambda a: regulariser(a, 6.0), (start,))
