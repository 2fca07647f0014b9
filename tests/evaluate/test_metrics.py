"""PSNR and Frechet distance against closed forms."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from fxquant.evaluate.metrics import (
    fd_ratio,
    frechet_distance,
    mean_psnr,
    psnr,
    relative_l2,
    spatial_frechet_distance,
)


def features(n: int, d: int, seed: int = 0) -> Tensor:
    """Random [n, d] float64 features with a non-trivial covariance."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + seed


def with_moments(mean: Tensor, covariance: Tensor, n: int = 50) -> Tensor:
    """Features whose sample mean and sample covariance are exactly the given ones."""
    raw = features(n, len(mean))
    centred = raw - raw.mean(dim=0)
    whitened = torch.linalg.qr(centred).Q * (n - 1) ** 0.5
    result: Tensor = whitened @ torch.linalg.cholesky(covariance).T + mean
    return result


def test_psnr_of_a_constant_error_is_known() -> None:
    a = torch.zeros(3, 1, 4, 4)
    b = a + torch.tensor([0.2, 0.02, 2.0]).reshape(3, 1, 1, 1)
    expected = torch.tensor([20.0, 40.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(psnr(a, b), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(psnr(a, b, 1.0), expected - 20 * math.log10(2), rtol=0, atol=1e-5)


def test_mean_psnr_averages_decibels_not_errors() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = a + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    assert mean_psnr(a, b) == pytest.approx(30.0, abs=1e-5)


def test_psnr_of_identical_images_is_infinite() -> None:
    a = torch.rand(2, 1, 4, 4)
    assert psnr(a, a).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("a", "b", "data_range", "message"),
    [
        pytest.param((2, 3), (2, 4), 2.0, "equal shapes", id="unequal shapes"),
        pytest.param((2, 3), (1, 3), 2.0, "equal shapes", id="would broadcast"),
        pytest.param((3,), (3,), 2.0, "non-empty batch", id="no batch"),
        pytest.param((0, 3), (0, 3), 2.0, "non-empty batch", id="empty"),
        pytest.param((2, 3), (2, 3), 0.0, "data_range", id="no range"),
    ],
)
def test_psnr_refuses(
    a: tuple[int, ...], b: tuple[int, ...], data_range: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        psnr(torch.zeros(a), torch.zeros(b), data_range)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    mean_x, mean_y = torch.tensor([[0.0, 1.0, -2.0], [1.0, 1.0, 2.0]]).double()
    std_x, std_y = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.5, 3.0]]).double()
    expected = ((mean_x - mean_y) ** 2).sum() + ((std_x - std_y) ** 2).sum()
    x = with_moments(mean_x, torch.diag(std_x**2))
    y = with_moments(mean_y, torch.diag(std_y**2), n=80)
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    x, y = features(200, 8), features(300, 8, seed=1)
    root = scipy.linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy())
    traces = x.T.cov().trace() + y.T.cov().trace() - 2 * root.real.trace()
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("n", [2, 5, 64, 500], ids=lambda n: f"N={n}")
def test_frechet_distance_to_itself_is_zero(n: int) -> None:
    x = features(n, 64)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_with_singular_covariances() -> None:
    x = features(5, 64)
    shifted = frechet_distance(x, x + 0.5)
    assert shifted == pytest.approx(64 * 0.25, rel=1e-9)
    constant = torch.ones(7, 64)
    assert frechet_distance(constant, constant) == 0.0
    dead = torch.cat([features(50, 4), torch.zeros(50, 60)], dim=1)
    assert frechet_distance(dead, dead + 1) == pytest.approx(64.0, rel=1e-9)


def test_frechet_distance_takes_float32_of_different_lengths() -> None:
    x, y = features(40, 6).float(), features(60, 6, seed=2).float()
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        pytest.param(torch.zeros(4, 3), torch.zeros(4, 2), "one d", id="different d"),
        pytest.param(torch.zeros(4), torch.zeros(4, 2), "one d", id="not a matrix"),
        pytest.param(torch.zeros(1, 3), torch.zeros(4, 3), "N >= 2", id="one row"),
        pytest.param(torch.zeros(4, 0), torch.zeros(4, 0), "d >= 1", id="no features"),
        pytest.param(torch.full((4, 3), math.nan), torch.zeros(4, 3), "NaN", id="nan"),
    ],
)
def test_frechet_distance_refuses(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)


def test_spatial_frechet_distance_sees_where_a_feature_lies() -> None:
    maps = features(60, 2 * 3 * 4).reshape(60, 2, 3, 4)
    assert spatial_frechet_distance(maps, maps.flip(0)) == pytest.approx(0.0, abs=1e-9)
    moved = maps.clone()
    moved[:, 1, 2, 3] += 2.0
    assert spatial_frechet_distance(maps, moved) == pytest.approx(4.0, rel=1e-9)
    rolled = maps.roll(1, dims=3)
    torch.testing.assert_close(rolled.mean((2, 3)), maps.mean((2, 3)))
    assert spatial_frechet_distance(maps, rolled) > 1


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        pytest.param(torch.zeros(4, 6), torch.zeros(4, 6), "N, C, H, W", id="no maps"),
        pytest.param(torch.zeros(4, 6, 1, 1), torch.zeros(4, 3, 2, 1), "one C", id="other maps"),
        pytest.param(torch.zeros(1, 2, 2, 2), torch.zeros(4, 2, 2, 2), "N >= 2", id="one map"),
        pytest.param(
            torch.full((4, 2, 2, 2), math.inf), torch.zeros(4, 2, 2, 2), "infinity", id="infinite"
        ),
    ],
)
def test_spatial_frechet_distance_refuses(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_frechet_distance(x, y)


def test_fd_ratio_is_one_for_a_perfect_quantisation_and_states_n() -> None:
    fp_a, fp_b = features(100, 4), features(100, 4, seed=1)
    perfect = fd_ratio(fp_b, fp_b, fp_a)
    assert perfect.ratio == 1.0
    assert str(perfect) == "1.000 (N = 100)"
    worse = fd_ratio(fp_b + 1, fp_b, fp_a)
    assert worse.ratio == pytest.approx(worse.fd_quantised / worse.fd_floor)
    assert worse.ratio > 1
    assert worse.fd_floor == perfect.fd_floor
    assert worse.n == 100


def test_fd_ratio_refuses_unequal_n_and_equal_seeds() -> None:
    x = features(10, 4)
    with pytest.raises(ValueError, match="same N"):
        fd_ratio(x[:5], x, x)
    with pytest.raises(ValueError, match="seeds A and B"):
        fd_ratio(x, torch.ones(10, 4), torch.ones(10, 4))


def test_relative_l2() -> None:
    b = torch.tensor([3.0, 4.0])
    assert relative_l2(b, b) == 0
    assert relative_l2(torch.tensor([3.0, 5.0]), b) == pytest.approx(0.2)
    assert relative_l2(torch.tensor([3.0, float("nan")]), b) == float("inf")
    assert relative_l2(torch.tensor([3.0, float("inf")]), b) == float("inf")
    with pytest.raises(ValueError, match="equal shapes"):
        relative_l2(b[:1], b)
