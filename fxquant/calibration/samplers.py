"""How many calibration samples each denoising step gives: one small pure function per method.

All have the signature `sampler(features, count, generator, **options) -> counts`. `features` holds
a map [B, C, ...] per step, of the same B trajectories at every step: a tensor [S, B, C, ...] or a
sequence of S tensors, which may be memory-mapped. Only `tdac` looks at more than their number. The
counts, int64 [S], are non-negative and sum to `count`. Step 0 is the noisiest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fxquant.errors import RecipeError

Features = Tensor | Sequence[Tensor]

TDAC_LAMBDA = 1.2
TDAC_QUANTILE = 0.25
# The fixed thresholds of EDA-DM's code, for maps of its own models.
PAPER_THRESHOLDS = {"cifar": 3.0, "imagenet": 3.0, "bedroom": 0.3, "church": 0.3, "sd": 0.3}

_SMALLEST_NORM = 1e-6  # of a channel vector, as in EDA-DM's cosine
_SAME_DIRECTION = 1e-12  # 1 - cosine that float32 maps cannot tell from 0
_CHUNK_BYTES = 2**26


def tdac(
    features: Features,
    count: int,
    generator: torch.Generator | None = None,
    *,
    variety_weight: float = TDAC_LAMBDA,
    threshold: float | None = None,
    quantile: float = TDAC_QUANTILE,
) -> Tensor:
    """Temporal distribution-aware counts of EDA-DM (arXiv 2401.04585).

    Args:
        variety_weight: lambda in w = density + lambda * variety, both min-max normalised.
        threshold, quantile: see `tdac_scores`.

    Raises:
        RecipeError: a variety_weight or quantile out of range, or maps with NaN or infinity.
    """
    density, variety = tdac_scores(features, threshold, quantile)
    return tdac_counts(density.tolist(), variety.tolist(), variety_weight, count)


def uniform(features: Features, count: int, generator: torch.Generator | None = None) -> Tensor:
    """The same number from every step, as near as it goes (Q-Diffusion, arXiv 2302.04304)."""
    edges = torch.arange(len(features) + 1) * count // len(features)
    return edges.diff()


def normal(features: Features, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Timesteps from a normal distribution, mean and deviation 0.4 T (PTQ4DM, arXiv 2211.15736).

    Timesteps count from the clean image: the mean lies nearer to it than to the noise. What falls
    outside goes to the first or last step.
    """
    steps = len(features)
    drawn = 0.4 * steps * (1 + torch.randn(count, generator=generator))
    from_clean = drawn.floor().long().clamp(0, steps - 1)
    return torch.bincount(steps - 1 - from_clean, minlength=steps)


def random(features: Features, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Every sample's step drawn uniformly."""
    steps = len(features)
    return torch.bincount(torch.randint(steps, (count,), generator=generator), minlength=steps)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "tdac": tdac,
    "uniform": uniform,
    "normal": normal,
    "random": random,
}


def tdac_scores(
    features: Features, threshold: float | None = None, quantile: float = TDAC_QUANTILE
) -> tuple[Tensor, Tensor]:
    """Density and variety of every step: float64 [S] each.

    Density is the number of other steps whose mean squared distance, over the whole map, is at
    most the threshold. Variety is 1 - cosine of channel vectors, summed over samples, positions
    and other steps. Maps are read a few samples at a time.

    Args:
        threshold: for models other than the paper's, None takes a quantile of the distances
            between steps: a fixed value calls all or none of their maps alike.
        quantile: in [0, 1], of the S (S - 1) / 2 distances; the nearest one below.

    Raises:
        RecipeError: quantile out of range, or maps with NaN or infinity.
    """
    if not 0 <= quantile <= 1:
        raise RecipeError(f"quantile={quantile!r}; it is between 0 and 1")
    distance, apart = _compare(features)
    if not (distance.isfinite().all() and apart.isfinite().all()):
        raise RecipeError(
            "TDAC cannot score feature maps with NaN or infinity; use another sampler, or a model "
            "and inputs that stay finite"
        )
    steps = len(features)
    others = ~torch.eye(steps, dtype=torch.bool)
    if threshold is None:
        pairs = distance[torch.ones(steps, steps, dtype=torch.bool).triu(1)].sort().values
        threshold = float(pairs[int(quantile * (len(pairs) - 1))]) if len(pairs) else 0.0
    density = ((distance <= threshold) & others).sum(1).double()
    variety = [math.fsum(row) for row in apart.tolist()]  # exact: no order of steps is favoured
    return density, torch.tensor(variety, dtype=torch.float64)


def tdac_counts(
    density: Sequence[float], variety: Sequence[float], variety_weight: float, count: int
) -> Tensor:
    """Counts in proportion to w = density + lambda * variety, each min-max normalised.

    A constant score counts as 0 everywhere; two of them give equal weights. Everything is exact:
    with float64, a share of 2.5 would round up or down by its last bit.

    Raises:
        RecipeError: variety_weight is negative or not finite.
    """
    if not 0 <= variety_weight < math.inf:
        raise RecipeError(f"variety_weight={variety_weight!r}; it is a number from 0 upwards")
    weight = Fraction(repr(float(variety_weight)))
    pairs = zip(_min_max(density), _min_max(variety), strict=True)
    return proportional_counts([d + weight * v for d, v in pairs], count)


def proportional_counts(weights: Sequence[Fraction], count: int) -> Tensor:
    """Counts int64 in proportion to the weights, rounded as in EDA-DM's code.

    Shares round half to even. What is missing goes one each to the largest counts, the earlier
    step first; what is too much is taken one each from the last steps backwards. Rounding is off
    by half a sample a step at most, so one round is enough. All weights zero: equal weights.
    """
    total = sum(weights)
    if not total:
        weights, total = [Fraction(1)] * len(weights), Fraction(len(weights))
    counts = [round(w * count / total) for w in weights]
    missing = count - sum(counts)
    if missing > 0:
        for s in sorted(range(len(counts)), key=lambda s: (-counts[s], s))[:missing]:
            counts[s] += 1
    elif missing < 0:
        for s in [s for s in reversed(range(len(counts))) if counts[s]][:-missing]:
            counts[s] -= 1
    return torch.tensor(counts, dtype=torch.int64)


def _compare(features: Features) -> tuple[Tensor, Tensor]:
    """Mean squared distance and summed 1 - cosine of all pairs of steps, float64 [S, S]."""
    steps = len(features)
    products = torch.zeros(steps, steps, dtype=torch.float64)
    cosines = torch.zeros(steps, steps, dtype=torch.float64)
    elements = positions = 0
    for maps in _chunks(features):  # [S, b, C, P]
        shifted = (maps - maps[:1]).flatten(1)  # distances stay, and equal maps become exact zeros
        products += shifted @ shifted.T
        norm = torch.linalg.vector_norm(maps, dim=2, keepdim=True).clamp(min=_SMALLEST_NORM)
        directions = (maps / norm).flatten(1)
        cosines += directions @ directions.T
        elements += maps[0].numel()
        positions += maps[0, :, 0].numel()
    squares = products.diagonal()
    distance = (squares[:, None] + squares - 2 * products).clamp(min=0) / elements
    apart = positions - cosines
    apart[apart < _SAME_DIRECTION * positions] = 0
    return _symmetric(distance), _symmetric(apart)


def _chunks(features: Features) -> Iterator[Tensor]:
    """[S, b, C, P] float64, a few samples of all steps at a time."""
    batch = features[0].shape[0]
    bytes_each = 8 * len(features) * features[0][:1].numel()
    size = max(1, _CHUNK_BYTES // max(1, bytes_each))
    for start in range(0, batch, size):
        maps = torch.stack([f[start : start + size] for f in features]).double()
        yield maps.reshape(*maps.shape[:2], maps.shape[2] if maps.ndim > 2 else 1, -1)


def _symmetric(values: Tensor) -> Tensor:
    """The upper triangle twice, and a diagonal of zeros."""
    upper = values.triu(1)
    return upper + upper.T


def _min_max(values: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(v) for v in values]
    low, high = min(exact), max(exact)
    if low == high:
        return [Fraction(0)] * len(exact)
    return [(v - low) / (high - low) for v in exact]
