"""SSIM against a loop over windows, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.evaluate.ssim import mean_ssim, ssim


def images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def naive(a: Tensor, b: Tensor, size: int, data_range: float) -> float:
    """SSIM of two planes [H, W], window by window."""
    reach = size // 2
    grid = [
        [math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-reach, reach + 1)]
        for i in range(-reach, reach + 1)
    ]
    weights = torch.tensor(grid, dtype=torch.float64)
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(a.shape[0] - size + 1):
        for j in range(a.shape[1] - size + 1):
            p, q = (x[i : i + size, j : j + size] for x in (a, b))
            mean_p, mean_q = (float((weights * x).sum()) for x in (p, q))
            var_p = float((weights * (p - mean_p) ** 2).sum())
            var_q = float((weights * (q - mean_q) ** 2).sum())
            both = float((weights * (p - mean_p) * (q - mean_q)).sum())
            values.append(
                (2 * mean_p * mean_q + c1)
                * (2 * both + c2)
                / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
            )
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(16, 16, 11), (13, 17, 11), (11, 11, 11), (8, 16, 7), (5, 5, 5), (1, 3, 1)],
)
@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_agrees_with_a_loop(height, width, size, data_range):
    a = images(2, 3, height, width)
    b = (a + 0.3 * images(2, 3, height, width, seed=1)).clamp(-1, 1)
    planes = [[naive(a[n, c], b[n, c], size, data_range) for c in range(3)] for n in range(2)]
    expected = torch.tensor(planes, dtype=torch.float64).mean(dim=1)
    torch.testing.assert_close(ssim(a, b, data_range), expected, rtol=1e-10, atol=1e-12)
    assert mean_ssim(a, b, data_range) == pytest.approx(float(expected.mean()), rel=1e-10)


def test_identical_images_are_one_and_negated_ones_are_below_zero():
    a = images(3, 1, 16, 16)
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))
    board = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64).repeat(1, 1, 8, 8)
    assert float(ssim(board, -board)) < -0.98


def test_of_constant_images_only_the_means_count():
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.1)
    c1 = 0.02**2
    expected = (2 * 0.5 * 0.1 + c1) / (0.5**2 + 0.1**2 + c1)
    assert float(ssim(a, b)) == pytest.approx(expected, rel=1e-6)


def test_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image", exc_type=ImportError)
    a = images(2, 3, 32, 24)
    b = (a + 0.3 * images(2, 3, 32, 24, seed=1)).clamp(-1, 1)
    _, everywhere = functional.structural_similarity_index_measure(
        a, b, data_range=2.0, reduction="none", return_full_image=True
    )
    theirs = everywhere[..., 5:-5, 5:-5].flatten(1).mean(dim=1)  # without the reflected border
    torch.testing.assert_close(ssim(a, b), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "data_range", "message"),
    [
        pytest.param(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5), 2.0, "equal", id="unequal"),
        pytest.param(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), 2.0, "N, C, H, W", id="no batch"),
        pytest.param(
            torch.zeros(0, 1, 4, 4), torch.zeros(0, 1, 4, 4), 2.0, "non-empty", id="empty"
        ),
        pytest.param(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), 0.0, "range", id="no range"),
        pytest.param(
            torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), math.nan), 2.0, "NaN", id="nan"
        ),
    ],
)
def test_refuses(a, b, data_range, message):
    with pytest.raises(ValueError, match=message):
        ssim(a, b, data_range)
