"""Counts per step: worked vectors, exact sums whatever the scores, scores by definition."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fxquant.calibration import samplers
from fxquant.calibration.samplers import (
    PAPER_THRESHOLDS,
    SAMPLERS,
    proportional_counts,
    tdac,
    tdac_counts,
    tdac_scores,
)
from fxquant.errors import RecipeError

SCORES = st.floats(0, 1e6, allow_nan=False) | st.integers(0, 50).map(float)
TABLES = st.integers(1, 40).flatmap(
    lambda s: st.tuples(*[st.lists(SCORES, min_size=s, max_size=s)] * 2)
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# The arithmetic of EDA-DM's allocation, worked out by hand.
@pytest.mark.parametrize(
    ("density", "variety", "weight", "count", "expected"),
    [
        ([1, 3, 4, 4, 2, 0], [9, 5, 3, 2, 4, 8], 1.2, 32, [7, 6, 6, 5, 4, 4]),
        ([0, 1, 1, 0], [4, 2, 1, 3], 1.0, 10, [2, 4, 2, 2]),
        ([0, 2, 2, 1, 0], [5, 1, 0, 2, 5], 5.0, 13, [4, 2, 1, 2, 4]),
    ],
    ids=["one too many", "one missing, ties at a half", "exact"],
)
def test_the_vectors_of_the_method(density, variety, weight, count, expected):
    assert tdac_counts(density, variety, weight, count).tolist() == expected


@given(TABLES, st.floats(0, 100), st.integers(0, 3000))
def test_counts_are_non_negative_and_sum_up_for_any_scores(table, weight, count):
    counts = tdac_counts(*table, weight, count)
    assert counts.dtype == torch.int64
    assert len(counts) == len(table[0])
    assert int(counts.sum()) == count
    assert int(counts.min()) >= 0


@given(st.integers(1, 40), SCORES, SCORES, st.floats(0, 100), st.integers(0, 3000))
def test_constant_scores_share_equally(steps, density, variety, weight, count):
    counts = tdac_counts([density] * steps, [variety] * steps, weight, count)
    assert int(counts.sum()) == count
    assert int(counts.max() - counts.min()) <= 1


@given(st.lists(st.fractions(0, 10), min_size=1, max_size=30), st.integers(0, 500))
def test_counts_stay_within_one_of_their_share(weights, count):
    total = sum(weights) or Fraction(len(weights))
    shares = [(w if sum(weights) else Fraction(1)) * count / total for w in weights]
    counts = proportional_counts(weights, count).tolist()
    assert sum(counts) == count
    assert all(abs(n - share) < 2 for n, share in zip(counts, shares, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(SAMPLERS)),
    st.integers(1, 12),
    st.integers(0, 200),
    st.integers(0, 9),
    st.sampled_from([0.0, 1e-8, 1.0, 1e6]),
)
def test_every_sampler_gives_non_negative_counts_that_sum_up(sampler, steps, count, seed, scale):
    maps = features(steps, 2, 3, 2, 2, seed=seed) * scale
    counts = SAMPLERS[sampler](maps, count, generator(seed))
    assert counts.dtype == torch.int64
    assert counts.shape == (steps,)
    assert int(counts.sum()) == count
    assert int(counts.min()) >= 0


def slow_scores(maps: Tensor, threshold: float) -> tuple[list[int], list[float]]:
    """Density and variety straight from their definitions, pair by pair."""
    steps = range(len(maps))
    density = [
        sum(bool((maps[s] - maps[r]).square().mean() <= threshold) for r in steps if r != s)
        for s in steps
    ]
    variety = [
        float(
            sum(
                (1 - F.cosine_similarity(maps[s], maps[r], dim=1, eps=1e-6)).sum()
                for r in steps
                if r != s
            )
        )
        for s in steps
    ]
    return density, variety


@pytest.mark.parametrize("shape", [(7, 3, 4, 2, 5), (6, 4, 5, 3), (5, 8, 2)])
def test_scores_follow_their_definition(shape, monkeypatch):
    monkeypatch.setattr(samplers, "_CHUNK_BYTES", 1)  # a sample at a time
    maps = features(*shape).double()
    maps[1] = maps[0] + 0.1
    maps[2] = 3 * maps[0]
    density, variety = tdac_scores(maps, 1.5)
    slow_density, slow_variety = slow_scores(maps, 1.5)
    assert 0 < sum(slow_density) < len(maps) * (len(maps) - 1)
    assert density.tolist() == slow_density
    torch.testing.assert_close(variety, torch.tensor(slow_variety, dtype=torch.float64))


def test_chunks_change_nothing_that_counts(monkeypatch):
    maps = features(6, 9, 4, 3, 3)
    whole = tdac_scores(maps)
    monkeypatch.setattr(samplers, "_CHUNK_BYTES", 6 * 8 * 36 * 2)
    for parts, all_at_once in zip(tdac_scores(maps), whole, strict=True):
        torch.testing.assert_close(parts, all_at_once)


def test_a_list_of_maps_is_as_good_as_a_tensor():
    maps = features(5, 3, 4, 2, 2)
    assert torch.equal(tdac(list(maps), 64), tdac(maps, 64))


def test_equal_maps_share_equally_and_score_alike():
    maps = features(1, 3, 4, 5, 5).expand(7, -1, -1, -1, -1)
    density, variety = tdac_scores(maps)
    assert density.tolist() == [6.0] * 7
    assert variety.tolist() == [0.0] * 7
    assert tdac(maps, 21).tolist() == [3] * 7


def test_the_threshold_is_a_quantile_of_the_distances_and_so_free_of_scale():
    maps = torch.tensor([0.0, 1.0, 3.0, 7.0]).reshape(4, 1, 1, 1, 1)  # distances 1 4 9 16 36 49
    degrees = {0.0: [1, 1, 0, 0], 0.4: [2, 2, 2, 0], 1.0: [3, 3, 3, 3]}
    for quantile, expected in degrees.items():
        for scale in (1, 1000):
            assert tdac_scores(maps * scale, quantile=quantile)[0].tolist() == expected


def test_the_papers_thresholds_are_fixed_distances():
    maps = torch.tensor([0.0, 0.5, 2.0]).reshape(3, 1, 1, 1, 1)  # distances 0.25 2.25 4
    assert tdac_scores(maps, PAPER_THRESHOLDS["sd"])[0].tolist() == [1, 1, 0]
    assert tdac_scores(maps, PAPER_THRESHOLDS["cifar"])[0].tolist() == [1, 2, 1]


def test_permuted_steps_have_permuted_scores():
    maps, order = features(8, 3, 4, 3, 3), torch.randperm(8, generator=generator(3))
    for moved, scores in zip(tdac_scores(maps[order]), tdac_scores(maps), strict=True):
        torch.testing.assert_close(moved, scores[order])


def test_a_larger_lambda_favours_variety():
    density, variety = [0.0, 4.0, 4.0], [9.0, 1.0, 0.0]
    first = [int(tdac_counts(density, variety, w, 100)[0]) for w in (0.0, 1.0, 5.0)]
    assert first[0] == 0 < first[1] < first[2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused(bad):
    maps = features(3, 2, 2, 2, 2)
    maps[1, 0, 0, 0, 0] = bad
    with pytest.raises(RecipeError, match=r"NaN or infinity; use another sampler"):
        tdac(maps, 8)


@pytest.mark.parametrize(
    "option", [{"variety_weight": -1.0}, {"variety_weight": float("nan")}, {"quantile": 1.5}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(RecipeError, match=next(iter(option))):
        tdac(features(3, 2, 2, 2, 2), 8, **option)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(4, 8, [2, 2, 2, 2]), (4, 6, [1, 2, 1, 2]), (4, 2, [0, 1, 0, 1]), (3, 0, [0, 0, 0])],
)
def test_uniform_spreads_evenly(steps, count, expected):
    assert SAMPLERS["uniform"](torch.empty(steps, 0), count).tolist() == expected


def test_normal_lies_around_four_tenths_of_the_way_from_the_clean_image():
    steps, count = 100, 20000
    counts = SAMPLERS["normal"](torch.empty(steps, 0), count, generator()).double()
    from_clean = torch.arange(steps).flip(0)  # step 0 is the noisiest
    inside = (from_clean > 0) & (from_clean < steps - 1)  # the two ends collect what is clamped
    peak = float((counts * inside).unfold(0, 9, 1).sum(1).argmax()) + 4
    assert abs(from_clean[int(peak)] - 40) < 12
    half = counts[from_clean < 40].sum() / count
    assert abs(half - 0.5) < 0.02
    # one deviation below the mean is t = 0, 16 % of a normal distribution
    assert abs(counts[-1] / count - 0.16) < 0.02
    assert abs(counts[0] / count - 0.07) < 0.02


def test_random_depends_on_its_generator_alone():
    empty = torch.empty(10, 0)
    first, again, other = (SAMPLERS["random"](empty, 500, generator(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.min()) > 20
