"""KID, inception score, precision and recall against loops and known answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.evaluate import distributions
from fxquant.evaluate.distributions import (
    inception_score,
    kernel_inception_distance,
    kid_over_subsets,
    precision_recall,
)


def features(n: int, d: int = 4, seed: int = 0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


def naive_kid(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def within(z: Tensor) -> float:
        n = len(z)
        pairs = ((i, j) for i in range(n) for j in range(n) if i != j)
        return sum(kernel(z[i], z[j]) for i, j in pairs) / (n * (n - 1))

    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * across


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 7), m=st.integers(2, 7), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_kid_agrees_with_a_double_loop(n, m, d, seed):
    x, y = features(n, d, seed), features(m, d, seed + 1, mean=0.5)
    assert kernel_inception_distance(x, y) == pytest.approx(naive_kid(x, y), rel=1e-9, abs=1e-9)


def test_kid_is_unbiased():
    same = torch.tensor(
        [
            kernel_inception_distance(features(10, 4, s), features(10, 4, 1000 + s))
            for s in range(400)
        ]
    )
    error = float(same.std()) / len(same) ** 0.5
    assert abs(float(same.mean())) < 3 * error
    assert bool((same < 0).any())
    assert float(same.mean()) + 10 * error < kernel_inception_distance(
        features(50), features(50, seed=1, mean=1.0)
    )


def test_balanced_classes_put_kid_below_the_truth():
    """By (1 - 1 / classes) / (n - 1) of the kernel's gap between same and other class, per set."""
    one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    balanced = torch.cat([one, other]).repeat(5, 1).double()
    gap = (2 + 1) ** 3 - 1  # x.y / d is 2 within a class and 0 across
    assert kernel_inception_distance(balanced, balanced) == pytest.approx(-2 * 0.5 / 9 * gap)


def test_kid_over_all_rows_is_the_full_estimate():
    x, y = features(20), features(20, seed=1, mean=0.3)
    found = kid_over_subsets(x, y, subsets=3, size=20)
    assert found.mean == pytest.approx(kernel_inception_distance(x, y))
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kid_over_subsets_is_unbiased_and_repeatable():
    x, y = features(60), features(80, seed=1, mean=0.5)
    found = kid_over_subsets(x, y, subsets=300, size=20)
    error = found.std / 300**0.5
    assert found.mean == pytest.approx(kernel_inception_distance(x, y), abs=4 * error)
    assert found.std > 0
    assert kid_over_subsets(x, y, subsets=300, size=20) == found
    assert kid_over_subsets(x, y, subsets=300, size=20, seed=1) != found


def test_inception_score_of_equal_rows_is_one():
    rows = torch.tensor([[0.7, 0.2, 0.1]]).expand(30, 3)
    assert inception_score(rows).mean == pytest.approx(1.0)
    assert inception_score(torch.full((30, 5), 0.2), splits=3) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_inception_score_of_sure_and_balanced_rows_is_the_number_of_classes(classes):
    rows = torch.eye(classes).repeat(10, 1)
    assert inception_score(rows, splits=10) == pytest.approx((classes, 0.0))


def test_inception_score_is_the_mean_over_consecutive_splits():
    sure, equal = torch.eye(4).repeat(2, 1), torch.full((8, 4), 0.25)
    assert inception_score(torch.cat([sure, equal]), splits=2) == pytest.approx((2.5, 1.5))


def test_inception_score_agrees_with_the_divergence():
    p = features(12, 5).softmax(dim=1)
    marginal = p.mean(dim=0)
    divergences = [float((row * (row / marginal).log()).sum()) for row in p]
    expected = math.exp(sum(divergences) / 12)
    assert inception_score(p, splits=1).mean == pytest.approx(expected, rel=1e-10)


def test_precision_and_recall_of_one_set_are_one_and_of_far_sets_zero():
    x = features(50)
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_precision_and_recall_on_a_line():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[1.5], [2.5], [4.0], [30.0]])
    # radii of real, k = 1: 1, 1, 1, 8; of generated: 1, 1, 1.5, 26
    found = precision_recall(generated, real, neighbours=1)
    assert found.precision == 3 / 4  # 4.0 only within 8 of 10
    assert found.recall == 3 / 4  # 0.0 is nobody's


def test_a_dropped_mode_costs_recall_and_not_precision():
    modes = torch.cat([features(100, seed=1), features(100, seed=2, mean=50.0)])
    half = modes[:100]
    assert precision_recall(half, modes) == (1.0, 0.5)
    assert precision_recall(modes, half) == (0.5, 1.0)


def test_equal_rows_lie_in_their_own_manifold():
    x = features(1, 64).repeat(6, 1).float() / 3
    assert precision_recall(x, x) == (1.0, 1.0)


def test_chunks_change_nothing(monkeypatch):
    x, y = features(30), features(40, seed=1, mean=0.5)
    whole = precision_recall(x, y)
    monkeypatch.setattr(distributions, "_CHUNK", 7)
    assert precision_recall(x, y) == whole
    assert 0 < whole.precision < 1
    assert 0 < whole.recall < 1


def test_agrees_with_torch_fidelity():
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_poly, mmd2
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    x, y = features(60), features(60, seed=1, mean=0.5)
    settings = {
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
    }
    kernels = [kernel_poly(a.numpy(), b.numpy(), **settings) for a, b in ((x, x), (x, y), (y, y))]
    assert kernel_inception_distance(x, y) == pytest.approx(mmd2(*kernels), rel=1e-9)
    theirs = isc_features_to_metric(x, splits=5, shuffle=False)
    assert inception_score(x.softmax(dim=1), splits=5) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"])
    )
    assert precision_recall(x, y) == pytest.approx(calculate_precision_recall_full(x, y, 3, 100))


BROKEN = [
    pytest.param(torch.zeros(4, 3), torch.zeros(4, 2), "one d", id="different d"),
    pytest.param(torch.zeros(4), torch.zeros(4), "one d", id="not a matrix"),
    pytest.param(torch.zeros(1, 3), torch.zeros(4, 3), "N >= 2", id="one row"),
    pytest.param(torch.full((4, 3), math.inf), torch.zeros(4, 3), "infinity", id="infinite"),
]


@pytest.mark.parametrize(("x", "y", "message"), BROKEN)
@pytest.mark.parametrize(
    "metric",
    [kernel_inception_distance, kid_over_subsets, precision_recall],
    ids=lambda f: f.__name__,
)
def test_bad_features_are_refused(metric, x, y, message):
    with pytest.raises(ValueError, match=message):
        metric(x, y)


@pytest.mark.parametrize(("subsets", "size"), [(0, 3), (1, 1), (1, 5)])
def test_impossible_subsets_are_refused(subsets, size):
    with pytest.raises(ValueError, match=r"KID needs one subset or more of 2 to 4 rows"):
        kid_over_subsets(features(4), features(9), subsets, size)


@pytest.mark.parametrize("neighbours", [0, 4])
def test_impossible_neighbours_are_refused(neighbours):
    with pytest.raises(ValueError, match="nearest others need more than"):
        precision_recall(features(4), features(9), neighbours)


@pytest.mark.parametrize(
    ("rows", "splits", "message"),
    [
        pytest.param(torch.zeros(3), 1, r"must be \[N, K\]", id="no matrix"),
        pytest.param(torch.zeros(0, 3), 1, r"must be \[N, K\]", id="empty"),
        pytest.param(torch.ones(2, 2), 1, "sum to 1", id="no probabilities"),
        pytest.param(torch.tensor([[1.5, -0.5]]), 1, "sum to 1", id="negative"),
        pytest.param(torch.full((2, 2), math.nan), 1, "sum to 1", id="nan"),
        pytest.param(torch.eye(2), 3, "3 splits", id="too many splits"),
        pytest.param(torch.eye(2), 0, "0 splits", id="no splits"),
    ],
)
def test_bad_probabilities_are_refused(rows, splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(rows, splits)
