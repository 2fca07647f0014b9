"""Fake quantisation: the values of the integers, and the gradients that go through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight, round_straight_through
from fxquant.quant.uniform import dequantize, integer_range, per_channel, quantize, weight_range

SCALES, ZEROS = [0.5, 0.05], [3.0, -20.0]
ROW = torch.tensor([SCALES, ZEROS]).T.contiguous()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("index", [0, 1])
def test_an_activation_equals_quantise_and_dequantise(index: int, bits: int) -> None:
    x = normal(2, 4, 5, 5)
    zero = ZEROS[index] if bits >= 8 else 1.0
    row = ROW.clone()
    row[index, 1] = zero
    scale = torch.tensor(SCALES[index])
    expected = dequantize(quantize(x, scale, zero, *integer_range(bits)), scale, zero)
    assert torch.equal(fake_quantize(x, row, index, bits), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 10)])
def test_a_weight_equals_quantise_and_dequantise(shape: tuple[int, ...], bits: int) -> None:
    weight, scale = normal(*shape), torch.linspace(0.01, 1, 6)
    step = per_channel(scale, len(shape), 0)
    expected = dequantize(quantize(weight, step, 0.0, *weight_range(bits)), step, 0.0)
    assert torch.equal(fake_quantize_weight(weight, scale, bits), expected)


def test_one_scale_may_serve_a_whole_weight() -> None:
    weight = normal(6, 4)
    one, six = (fake_quantize_weight(weight, torch.full((n,), 0.1), 8) for n in (1, 6))
    assert torch.equal(one, six)


def test_rounding_is_half_to_even_with_gradient_one() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 2.5, 0.3], requires_grad=True)
    y = round_straight_through(x)
    y.sum().backward()
    assert y.tolist() == [-2, 0, 0, 2, 0]
    assert x.grad.tolist() == [1] * 5


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_a_row_per_sample_equals_separate_calls(ndim: int) -> None:
    x = normal(3, *[4] * (ndim - 1))
    rows = torch.stack([ROW, ROW * 2, ROW * 3])
    together = fake_quantize(x, rows, 1, 8)
    for sample, row, found in zip(x, rows, together, strict=True):
        assert torch.equal(fake_quantize(sample[None], row, 1, 8)[0], found)


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    x = torch.tensor([-70.0, -60.0, 0.1, 60.0, 70.0], requires_grad=True)
    fake_quantize(x, ROW, 0, 8).sum().backward()  # represents [-65.5, 62]
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_weight_gradients_pass_inside_the_range_and_stop_outside() -> None:
    weight = torch.tensor([[-9.0, -8.0, 0.2, 7.0, 8.0]], requires_grad=True)
    fake_quantize_weight(weight, torch.ones(1), 4).sum().backward()
    assert weight.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_the_scale_gradient_is_that_of_learned_step_sizes() -> None:
    x, row = torch.tensor([0.6, -1.4, 1e3, -1e3]), ROW.clone().requires_grad_()
    for k, value in enumerate(x):
        row.grad = None
        fake_quantize(value[None], row, 0, 8).sum().backward()
        ratio = float(value) / SCALES[0]
        expected = (round(ratio) - ratio, round(ratio) - ratio, 127 - 3, -128 - 3)[k]
        assert float(row.grad[0, 0]) == pytest.approx(expected, abs=1e-5)
        assert torch.equal(row.grad[1], torch.zeros(2)), "another quantiser got a gradient"


def test_the_scale_gradient_outside_the_range_is_the_finite_difference() -> None:
    x, delta = torch.tensor([1e3, -1e3, 400.0]), 1e-2

    def total(scale: float) -> float:
        return float(fake_quantize(x, torch.tensor([[scale, 3.0]]), 0, 8).double().sum())

    row = torch.tensor([[0.5, 3.0]], requires_grad=True)
    fake_quantize(x, row, 0, 8).sum().backward()
    slope = (total(0.5 + delta) - total(0.5 - delta)) / (2 * delta)
    assert float(row.grad[0, 0]) == pytest.approx(slope, rel=1e-3)


def test_the_weight_scale_gradient_has_an_entry_per_channel() -> None:
    weight, scale = torch.tensor([[100.0], [0.3], [-100.0]]), torch.ones(3, requires_grad=True)
    fake_quantize_weight(weight, scale, 4).sum().backward()
    assert scale.grad.tolist() == pytest.approx([7, -0.3, -8])


def test_gradients_reach_the_row_of_each_sample_alone() -> None:
    rows = torch.stack([ROW, ROW, ROW]).requires_grad_()
    fake_quantize(normal(3, 5), rows, 0, 8)[1].sum().backward()
    touched = rows.grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_input_comes_back(dtype: torch.dtype) -> None:
    assert fake_quantize(normal(2, 3).to(dtype), ROW, 0, 8).dtype == dtype
    assert fake_quantize_weight(normal(2, 3).to(dtype), torch.ones(2), 8).dtype == dtype


def test_it_is_idempotent() -> None:
    once = fake_quantize(normal(2, 30), ROW, 1, 8)
    assert torch.equal(fake_quantize(once, ROW, 1, 8), once)
