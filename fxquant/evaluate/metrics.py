"""PSNR, Frechet distances, relative L2. Distances depend on the number of images N: N is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FDRatio:
    """FD(quantised, seeds B; FP, seeds A) / FD(FP, seeds B; FP, seeds A); 1.0 is perfect.

    The floor shrinks with N, so two ratios compare only at the same `n`.
    """

    ratio: float
    fd_quantised: float
    fd_floor: float
    n: int

    def __str__(self) -> str:
        return f"{self.ratio:.3f} (N = {self.n:,})"


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """PSNR in dB of each image, [N] float64: 10 log10(data_range^2 / MSE of that image).

    `a` and `b` are [N, ...] of one shape; `data_range` is max - min, 2.0 for images in [-1, 1].
    Identical images give inf. ValueError on unequal or empty shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"psnr compares equal shapes, got {list(a.shape)} and {list(b.shape)}")
    if a.ndim < 2 or not a.numel():
        raise ValueError(f"psnr needs a non-empty batch [N, ...], got {list(a.shape)}")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    mse = (a.double() - b.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / mse)


def mean_psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> float:
    """The mean over the N images of their PSNR in dB (not the PSNR of the mean MSE).

    One identical pair makes it inf.
    """
    return float(psnr(a, b, data_range).mean())


def frechet_distance(x_features: Tensor, y_features: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features [N, d] and [M, d].

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), sample covariances, in float64.
    With C = R^T R from a QR of the centred features, the last trace is the nuclear norm of
    R_x R_y^T: no matrix square root, so singular covariances (N <= d) need no special case.
    ValueError on bad shapes, fewer than two rows, or non-finite features.
    """
    check_features(x_features, y_features)
    mean_x, root_x = _gaussian(x_features)
    mean_y, root_y = _gaussian(y_features)
    traces = root_x.square().sum() + root_y.square().sum()
    cross = torch.linalg.matrix_norm(root_x @ root_y.T, ord="nuc")
    distance = (mean_x - mean_y).square().sum() + traces - 2 * cross
    return max(0.0, float(distance))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, d] -> mean [d] and R [min(N, d), d] with R^T R = the sample covariance."""
    features = features.detach().cpu().double()
    mean = features.mean(dim=0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R


def spatial_frechet_distance(x_maps: Tensor, y_maps: Tensor) -> float:
    """Frechet distance between feature maps [N, C, H, W] and [M, C, H, W], position by position.

    Each map is flattened to C * H * W numbers, so where a feature lies counts, as in the sFID of
    Nash, Menick, Dieleman, Battaglia 2021 (which takes 7 channels of 17 x 17 from Inception).
    ValueError as `frechet_distance`, or maps of other shapes.
    """
    shapes = f"{list(x_maps.shape)} and {list(y_maps.shape)}"
    if x_maps.ndim != 4 or y_maps.ndim != 4 or x_maps.shape[1:] != y_maps.shape[1:]:
        raise ValueError(f"feature maps must be [N, C, H, W] with one C, H and W, got {shapes}")
    return frechet_distance(x_maps.flatten(1), y_maps.flatten(1))


def check_features(*features: Tensor) -> None:
    """Raise ValueError unless all are finite [N, d] with N >= 2 and one d >= 1."""
    shapes = " and ".join(str(list(f.shape)) for f in features)
    if any(f.ndim != 2 or f.shape[1] != features[0].shape[-1] for f in features):
        raise ValueError(f"features must be [N, d] with one d, got {shapes}")
    if any(len(f) < 2 for f in features) or not features[0].shape[1]:
        raise ValueError(f"a distance of sets needs N >= 2 and d >= 1, got {shapes}")
    if not all(f.isfinite().all() for f in features):
        raise ValueError(f"features {shapes} contain NaN or infinity")


def fd_ratio(quantised_b: Tensor, fp_b: Tensor, fp_a: Tensor) -> FDRatio:
    """FD of quantised to FP images over FD of FP to FP images, from features [N, d] of each.

    `_b` and `_a` name the two seed sets; `quantised_b` and `fp_b` share their initial noise.
    ValueError unless all three have the same shape and the floor is above zero.
    """
    shapes = [list(f.shape) for f in (quantised_b, fp_b, fp_a)]
    if shapes.count(shapes[0]) != 3:
        raise ValueError(f"fd_ratio needs the same N and d three times, got {shapes}")
    floor = frechet_distance(fp_b, fp_a)
    if floor == 0.0:
        raise ValueError("FD between the two FP sets is zero: seeds A and B must differ")
    quantised = frechet_distance(quantised_b, fp_a)
    return FDRatio(quantised / floor, quantised, floor, len(fp_a))


def relative_l2(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| over all elements; inf if `a` is not finite. ValueError on other shapes."""
    if a.shape != b.shape:
        raise ValueError(f"relative_l2 needs equal shapes, got {list(a.shape)} and {list(b.shape)}")
    difference = (a.double() - b.double()).norm()
    if not difference.isfinite():
        return float("inf")
    return float(difference / b.double().norm().clamp(min=1e-30))
