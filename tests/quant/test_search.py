"""The range search against trying every candidate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant.quant import search
from fxquant.quant.search import absmax_weight_scale, pnorm_range, pnorm_weight_scale
from fxquant.quant.uniform import (
    affine_parameters,
    dequantize,
    integer_range,
    quantize,
    weight_range,
)

CANDIDATES = 100


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def with_outlier() -> Tensor:
    x = torch.randn(6, 600, generator=generator())
    x[:, 0] = 30
    return x


DATA: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(6, 600, generator=generator()),
    "uniform": lambda: torch.rand(6, 600, generator=generator()) * 2 - 1,
    "heavy tails": lambda: torch.randn(6, 600, generator=generator()) ** 3,
    "one-sided": lambda: torch.randn(6, 600, generator=generator()).relu(),
    "outlier": with_outlier,
}


def errors(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """mean |x - x^|^2.4 of each row."""
    scale, zero = scale[:, None], zero[:, None]
    back = dequantize(quantize(x, scale, zero, low, high), scale, zero)
    return (x - back).abs().pow(2.4).mean(1)


def weight_errors(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    return errors(x, scale, torch.zeros_like(scale), *weight_range(bits))


def range_errors(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    return errors(x, *affine_parameters(low, high, bits, symmetric), *integer_range(bits))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("data", DATA)
def test_weight_scales_are_as_good_as_those_of_100_candidates(data: str, bits: int) -> None:
    x = DATA[data]()
    full = absmax_weight_scale(x, bits)
    tried = [weight_errors(x, full * k / CANDIDATES, bits) for k in range(1, CANDIDATES + 1)]
    found = weight_errors(x, pnorm_weight_scale(x, bits), bits)
    assert (found <= torch.stack(tried).amin(0) * 1.05).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("data", DATA)
def test_ranges_are_as_good_as_those_of_100_candidates(
    data: str, bits: int, symmetric: bool
) -> None:
    x = DATA[data]()
    low, high = x.amin(1).clamp(max=0), x.amax(1)
    tried = [
        range_errors(x, low * k / CANDIDATES, high * k / CANDIDATES, bits, symmetric)
        for k in range(1, CANDIDATES + 1)
    ]
    found = range_errors(x, *pnorm_range(x, bits, symmetric), bits, symmetric)
    assert (found <= torch.stack(tried).amin(0) * 1.05).all()


@pytest.mark.parametrize("data", DATA)
def test_no_result_is_worse_than_the_full_range(data: str) -> None:
    x = DATA[data]()
    full = weight_errors(x, absmax_weight_scale(x, 4), 4)
    assert (weight_errors(x, pnorm_weight_scale(x, 4), 4) <= full).all()


def test_4_bit_normal_weights_are_clipped() -> None:
    x = DATA["normal"]()
    assert (pnorm_weight_scale(x, 4) < 0.95 * absmax_weight_scale(x, 4)).all()


def test_fewer_candidates_are_tried_than_the_published_100(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    original = search._pnorm_error
    monkeypatch.setattr(search, "_pnorm_error", lambda *a: counted.append(1) or original(*a))
    pnorm_weight_scale(torch.randn(3, 10, generator=generator()), 4)
    assert 20 < len(counted) <= 45


def test_rows_are_searched_apart() -> None:
    x = torch.stack([DATA["normal"]()[0], DATA["heavy tails"]()[0]])
    alone = torch.cat([pnorm_weight_scale(row[None], 4) for row in x])
    assert torch.equal(pnorm_weight_scale(x, 4), alone)


def test_large_weights_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = DATA["normal"]()
    whole = pnorm_weight_scale(x, 4)
    monkeypatch.setattr(search, "_CHUNK_ELEMENTS", 2 * x.shape[1])
    assert torch.equal(pnorm_weight_scale(x, 4), whole)


def test_convolution_weights_have_a_scale_per_output_channel() -> None:
    weight = torch.randn(5, 3, 2, 2, generator=generator(), requires_grad=True)
    for scale in (pnorm_weight_scale(weight, 4), absmax_weight_scale(weight, 8)):
        assert scale.shape == (5,)
        assert not scale.requires_grad


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7), (16, 32767)])
def test_absmax_represents_the_largest_weight(bits: int, largest: int) -> None:
    scale = absmax_weight_scale(torch.tensor([[0.5, -2.0], [1.0, 0.0]]), bits)
    assert torch.allclose(scale * largest, torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("search_scale", [absmax_weight_scale, pnorm_weight_scale])
def test_a_channel_of_zeros_has_a_usable_scale(
    search_scale: Callable[[Tensor, int], Tensor],
) -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    scale = search_scale(weight, 4)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()


def test_a_row_of_zeros_has_an_empty_range() -> None:
    low, high = pnorm_range(torch.zeros(1, 8), 8, False)
    assert float(low) == float(high) == 0
