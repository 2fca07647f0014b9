"""How two sets of images differ as sets: KID, inception score, precision and recall.

Every figure depends on the feature and on the numbers of images; name both beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.evaluate.metrics import check_features

NEIGHBOURS = 3
_CHUNK = 1000  # rows of a distance matrix held at once


class Spread(NamedTuple):
    """Mean and population standard deviation over subsets or splits."""

    mean: float
    std: float


def kernel_inception_distance(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared MMD between features [N, d] and [M, d], of all of them.

    Kernel (x.y / d + 1)^3 (Binkowski, Sutherland, Arbel, Gretton 2018), pairs of one image with
    itself left out, in float64. The expectation is zero for independent draws from one
    distribution, so negative values occur. Sets with balanced classes are not independent draws:
    fewer of their pairs share a class, and the estimate lies below the truth by O(1 / N).

    Raises:
        ValueError: not matrices of one width, fewer than two rows, or non-finite features.
    """
    check_features(x, y)
    x, y = (f.detach().cpu().double() for f in (x, y))
    within = _mean_off_diagonal(_kernel(x, x)) + _mean_off_diagonal(_kernel(y, y))
    return float(within - 2 * _kernel(x, y).mean())


def kid_over_subsets(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Spread:
    """`kernel_inception_distance` of random subsets of equal size, as tables report it.

    Args:
        x, y: features [N, d] and [M, d].
        subsets: how many pairs of subsets.
        size: rows of each, drawn without replacement.
        seed: of the draws.

    Raises:
        ValueError: as above, no subsets, or a size below two or above N or M.
    """
    check_features(x, y)
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise ValueError(
            f"KID needs one subset or more of 2 to {min(len(x), len(y))} rows, got {subsets} of "
            f"{size}"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(features: Tensor) -> Tensor:
        chosen = torch.randperm(len(features), generator=generator)[:size]
        return features.detach().cpu()[chosen]

    return _spread([kernel_inception_distance(draw(x), draw(y)) for _ in range(subsets)])


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.trace()) / (n * (n - 1))


def inception_score(probabilities: Tensor, splits: int = 10) -> Spread:
    """exp(mean over images of KL(p(class | image) || p(class))), over consecutive splits.

    Salimans et al. 2016. 1 if every image is read alike, K if each is read surely and all classes
    are equally frequent. With another classifier than Inception it is not "the" inception score.

    Args:
        probabilities: [N, K] of each class, rows sum to 1.
        splits: parts of N // splits or one more images in their given order; p(class) is the mean
            of the part. 10 is the paper's, 1 takes all together.

    Raises:
        ValueError: not [N, K], rows that are no probabilities, or more splits than images.
    """
    _check_probabilities(probabilities, splits)
    parts = probabilities.detach().cpu().double().tensor_split(splits)
    return _spread([_score(part) for part in parts])


def _score(p: Tensor) -> float:
    entropies = -torch.xlogy(p, p).sum(dim=1)
    marginal = p.mean(dim=0)
    entropy = -torch.xlogy(marginal, marginal).sum()
    return float(torch.exp(entropy - entropies.mean()))


def _check_probabilities(probabilities: Tensor, splits: int) -> None:
    shape = list(probabilities.shape)
    if probabilities.ndim != 2 or not probabilities.numel():
        raise ValueError(f"probabilities must be [N, K], got {shape}")
    rows = probabilities.double().sum(dim=1)
    near_one = torch.allclose(rows, torch.ones_like(rows), rtol=0, atol=1e-3)
    if not near_one or bool((probabilities < 0).any()):
        raise ValueError(f"rows of probabilities {shape} must be 0 or more and sum to 1")
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"{shape[0]} images cannot make {splits} splits")


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1].

    Attributes:
        precision: of generated images inside the manifold of the real ones: quality.
        recall: of real images inside the manifold of the generated ones: variety.
    """

    precision: float
    recall: float


def precision_recall(
    generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Improved precision and recall of features [N, d] against [M, d].

    Kynkaanniemi, Karras, Laine, Lehtinen, Aila 2019: the manifold of a set is the union of balls
    around its members that just reach their k-th nearest other member. Euclidean distances in
    float64, from differences, so that equal features are exactly 0 apart; never more than 1,000
    rows of a distance matrix are held.

    Args:
        generated, real: features.
        neighbours: k, 3 in the paper.

    Raises:
        ValueError: not matrices of one width, k below 1, k or fewer rows, or non-finite features.
    """
    check_features(generated, real)
    if not 1 <= neighbours < min(len(generated), len(real)):
        raise ValueError(
            f"the {neighbours} nearest others need more than {max(neighbours, 1)} rows (and at "
            f"least 1 neighbour), got {len(generated)} and {len(real)}"
        )
    generated, real = (f.detach().cpu().double() for f in (generated, real))
    return PrecisionRecall(
        _fraction_inside(generated, real, neighbours), _fraction_inside(real, generated, neighbours)
    )


def _fraction_inside(points: Tensor, members: Tensor, neighbours: int) -> float:
    """The fraction of points in the manifold of the members."""
    radii = torch.cat(
        [
            _distances(part, members).kthvalue(neighbours + 1, dim=1).values  # the first is itself
            for part in members.split(_CHUNK)
        ]
    )
    inside = [(_distances(part, members) <= radii).any(dim=1) for part in points.split(_CHUNK)]
    return float(torch.cat(inside).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _spread(values: list[float]) -> Spread:
    found = torch.tensor(values, dtype=torch.float64)
    return Spread(float(found.mean()), float(found.std(correction=0)))
