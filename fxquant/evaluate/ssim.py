"""SSIM: how alike two images are in local mean, contrast and structure."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """SSIM of each image, [N] float64 in [-1, 1]; 1 for identical images.

    Wang, Bovik, Sheikh, Simoncelli 2004: Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01,
    K2 = 0.03, weighted population variances, the mean over all channels and over the positions
    where the window lies inside the image (torchmetrics adds a reflected border). On images with
    a side below 11 the window is the largest odd size that fits, with the same sigma.

    Args:
        a, b: [N, C, H, W] of one shape, any float dtype; computed in float64.
        data_range: max - min of the images, 2.0 for [-1, 1].

    Raises:
        ValueError: other or unequal shapes, an empty batch, non-finite pixels, or
            `data_range` <= 0.
    """
    _check(a, b, data_range)
    a, b = a.double(), b.double()
    window = _window(min(WINDOW, *a.shape[-2:])).to(a.device)
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    var_a = _blur(a * a, window) - mean_a**2
    var_b = _blur(b * b, window) - mean_b**2
    covariance = _blur(a * b, window) - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def mean_ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> float:
    """The mean over the N images of their SSIM."""
    return float(ssim(a, b, data_range).mean())


def _window(side: int) -> Tensor:
    """The largest odd size up to `side`: [size] float64, sums to 1."""
    reach = (side - 1) // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _blur(x: Tensor, window: Tensor) -> Tensor:
    """The separable weighted mean [N, C, H - size + 1, W - size + 1]."""
    planes = x.flatten(0, 1)[:, None]
    rows = F.conv2d(planes, window.reshape(1, 1, -1, 1))
    return F.conv2d(rows, window.reshape(1, 1, 1, -1)).unflatten(0, x.shape[:2])


def _check(a: Tensor, b: Tensor, data_range: float) -> None:
    if a.shape != b.shape:
        raise ValueError(f"ssim compares equal shapes, got {list(a.shape)} and {list(b.shape)}")
    if a.ndim != 4 or not a.numel():
        raise ValueError(f"ssim needs a non-empty batch [N, C, H, W], got {list(a.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"images {list(a.shape)} contain NaN or infinity")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
