"""Which samples calibrate: what compile and record_selected have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.samplers import SAMPLERS, Features, tdac_counts, tdac_scores
from fxquant.errors import RecipeError, near

log = logging.getLogger(__name__)

FEWEST_PAIRS = 8
_MIDDLE = "mid_block.resnets.0"
_BLOCKS = "transformer_blocks"


@dataclass(frozen=True)
class Choice:
    """How many samples each timestep gives, and why.

    Attributes:
        sampler: the one used.
        reason: why it is not the one asked for, None if it is.
        timesteps: the distinct ones, noisiest first; [0.0] for a model without.
        counts: int64 [S], samples by timestep; of record_selected, trajectories.
        density, variety: TDAC's scores, float64 [S]; None for other samplers.
    """

    sampler: str
    reason: str | None
    timesteps: tuple[float, ...]
    counts: Tensor
    density: Tensor | None = None
    variety: Tensor | None = None


def check_sampler(sampler: str, count: int) -> None:
    """Raises RecipeError for an unknown sampler, or a count of samples below 1."""
    if sampler not in SAMPLERS:
        raise RecipeError(f"unknown sampler {sampler!r}.{near(sampler, SAMPLERS)}")
    if count < 1:
        raise RecipeError(f"count={count!r}; ask for 1 sample or more")


def choose(
    sampler: str,
    timesteps: Sequence[float],
    count: int,
    generator: torch.Generator,
    features: Callable[[], Features],
    why_not: str | None = None,
    *,
    variety_weight: float,
    threshold: float | None,
) -> Choice:
    """Ask a sampler for its counts.

    Args:
        features: gives the maps by timestep; asked only for TDAC.
        why_not: why there are no such maps. TDAC then says so, and the choice is uniform.
    """
    times = tuple(timesteps)
    if sampler == "tdac" and why_not is None:
        density, variety = tdac_scores(features(), threshold)
        counts = tdac_counts(density.tolist(), variety.tolist(), variety_weight, count)
        return Choice(sampler, None, times, counts, density, variety)
    reason = None
    if sampler == "tdac":
        log.warning("TDAC needs paired samples: %s. Taking samples uniformly instead", why_not)
        sampler, reason = "uniform", why_not
    counts = SAMPLERS[sampler](torch.empty(len(times), 0), count, generator)
    return Choice(sampler, reason, times, counts)


def draw(sizes: Sequence[int], counts: Tensor, generator: torch.Generator) -> list[list[int]]:
    """Positions below sizes[s], counts[s] of them, for each step s.

    A position is a trajectory, where steps are equally long. All take turns in one random order, so
    none gives a second sample before each gave one, and none gives the same step twice as long as
    counts[s] <= sizes[s]. EDA-DM's random permutation of step labels, for any number of samples.
    """
    order = torch.randperm(max(sizes), generator=generator).tolist()
    drawn, turn = [], 0
    for size, wanted in zip(sizes, counts.tolist(), strict=True):
        mine = [position for position in order if position < size]
        drawn.append([mine[(turn + k) % size] for k in range(wanted)])
        turn += wanted
    return drawn


def middle(paths: Collection[str]) -> str | None:
    """Path of the module whose output TDAC compares, among a model's module paths; None if none.

    A UNet's is what enters the attention of its middle block, a transformer's what leaves the block
    at half depth.
    """
    if _MIDDLE in paths:
        return _MIDDLE
    depth = sum(path.rpartition(".")[0] == _BLOCKS for path in paths)
    return f"{_BLOCKS}.{depth // 2}" if depth else None


NO_MIDDLE = f"the model has neither {_MIDDLE} nor {_BLOCKS}"


def too_few(pairs: int) -> str | None:
    """Why so few rows of a timestep cannot be compared; None if they can."""
    if pairs < FEWEST_PAIRS:
        return f"{pairs} samples a timestep are fewer than the {FEWEST_PAIRS} it needs"
    return None


def as_map(value: Tensor) -> Tensor:
    """A copy of a block's output, [B, C, ...] float32 on the CPU; tokens come as [B, C, L]."""
    value = value.detach().to("cpu", torch.float32, copy=True)
    return value.transpose(1, 2) if value.ndim == 3 else value
