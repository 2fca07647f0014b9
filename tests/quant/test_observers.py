"""Observers on data whose range is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.errors import RecipeError
from fxquant.quant.observers import OBSERVERS, ObservedEdge, check_observer
from fxquant.quant.spec import QuantSpec
from fxquant.quant.uniform import affine_parameters, dequantize, integer_range, quantize


def observe(name: str, *batches: Tensor, bits: int = 8) -> tuple[float, float]:
    observer = OBSERVERS[name](QuantSpec(bits, observer=name))
    for batch in batches:
        observer.update(batch, (float(batch.min()), float(batch.max())))
    return observer.range()


def error(x: Tensor, low: float, high: float, bits: int) -> float:
    """mean |x - x^|^2.4 when [low, high] is represented."""
    scale, zero = affine_parameters(torch.tensor(low), torch.tensor(high), bits, False)
    back = dequantize(quantize(x, scale, zero, *integer_range(bits)), scale, zero)
    return float((x - back).abs().pow(2.4).mean())


A, B = torch.tensor([[-1.0, 0.5], [2.0, 3.0]]), torch.tensor([-4.0, 1.0])


@pytest.mark.parametrize("name", OBSERVERS)
def test_one_batch_on_a_fine_grid_gives_its_own_range(name: str) -> None:
    low, high = observe(name, torch.linspace(-1, 3, 100_001), bits=16)
    assert low == pytest.approx(-1, abs=0.01)
    assert high == pytest.approx(3, abs=0.01)


def test_minmax_keeps_the_extremes_of_all_batches() -> None:
    assert observe("minmax", A, B) == observe("minmax", B, A) == (-4.0, 3.0)


def test_the_first_batch_starts_the_moving_average() -> None:
    assert observe("moving_average", A) == (-1.0, 3.0)


def test_the_moving_average_is_nine_tenths_old_and_one_tenth_new() -> None:
    low, high = observe("moving_average", A, B, A)
    assert low == pytest.approx(0.9 * (0.9 * -1 + 0.1 * -4) + 0.1 * -1)
    assert high == pytest.approx(0.9 * (0.9 * 3 + 0.1 * 1) + 0.1 * 3)


def with_outlier(value: float) -> Tensor:
    x = torch.linspace(-1, 1, 100_000)
    x[50_000] = value
    return x


def test_the_percentile_ignores_a_lone_outlier() -> None:
    low, high = observe("percentile", with_outlier(1000.0))
    assert high == pytest.approx(1, abs=1e-3)
    assert low == pytest.approx(-1, abs=1e-3)
    assert observe("minmax", with_outlier(1000.0))[1] == 1000


def test_the_percentile_takes_a_sample_of_large_batches() -> None:
    x = torch.linspace(-1, 1, 17_000_000)  # torch.quantile refuses more than 2^24
    low, high = observe("percentile", x)
    assert (low, high) == pytest.approx((-1, 1), abs=1e-3)


def test_percentiles_are_averaged_over_batches() -> None:
    x = torch.linspace(-1, 1, 10_001)
    assert observe("percentile", x, 3 * x)[1] == pytest.approx(0.9 + 0.1 * 3, abs=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_pnorm_clips_outliers_and_beats_the_full_range(bits: int) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 12.0, -12.0
    found, full = observe("pnorm", x, bits=bits), observe("minmax", x)
    assert full[0] < found[0] < 0 < found[1] < full[1]
    assert error(x, *found, bits) < error(x, *full, bits)


def test_pnorm_ranges_are_averaged_over_batches() -> None:
    x = torch.linspace(-1, 1, 1001)
    first, both = observe("pnorm", x)[1], observe("pnorm", x, 3 * x)[1]
    assert both == pytest.approx(1.2 * first, rel=1e-4)


@pytest.mark.parametrize("name", OBSERVERS)
def test_half_precision_and_any_memory_layout_are_fine(name: str) -> None:
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, high = observe(name, x)
    strided = x.to(memory_format=torch.channels_last).transpose(0, 1)
    assert observe(name, strided) == pytest.approx((low, high), rel=1e-6)
    assert -6 < low < 0 < high < 6


def test_an_unknown_observer_gets_a_near_name_and_the_list() -> None:
    with pytest.raises(RecipeError) as caught:
        check_observer("min_max")
    message = str(caught.value)
    assert "unknown observer 'min_max'. Did you mean 'minmax'?" in message
    assert all(name in message for name in OBSERVERS)


def test_an_edge_returns_its_input_itself() -> None:
    edge = ObservedEdge(QuantSpec(), 1)
    assert edge(A, torch.zeros(2, dtype=torch.int64)) is A


def test_each_sample_counts_for_the_row_of_its_group() -> None:
    edge = ObservedEdge(QuantSpec(), 3)
    x = torch.tensor([[1.0, 2.0], [-5.0, 5.0], [3.0, 4.0]])
    edge(x, torch.tensor([0, 2, 0]))
    assert edge.rows[0].range() == (1.0, 4.0)
    assert edge.rows[2].range() == (-5.0, 5.0)
    assert edge.seen == [1, 0, 1]


def test_with_one_row_the_group_does_not_matter() -> None:
    edge = ObservedEdge(QuantSpec(), 1)
    edge(torch.arange(6.0).view(3, 2), torch.tensor([0, 0, 0]))
    assert edge.rows[0].range() == (0.0, 5.0)


def test_observing_keeps_no_gradient_history() -> None:
    x = torch.ones(2, requires_grad=True)
    edge = ObservedEdge(QuantSpec(observer="moving_average"), 1)
    edge(x * 2, torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))
    assert edge.rows[0].range() == (2.0, 2.0)
