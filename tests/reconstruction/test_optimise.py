"""One unit: its gradients, its schedules, what training leaves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fxquant.quant.adaround import Rounding
from fxquant.quant.search import pnorm_weight_scale
from fxquant.reconstruction.losses import block_loss, fbr_loss, squared_error
from fxquant.reconstruction.optimise import (
    UnitData,
    UnitGraphs,
    dropped_fake_quantize,
    optimise,
    rounding_schedule,
    serving_loss,
    with_steps,
)
from fxquant.reconstruction.settings import Reconstruction

TABLE = torch.tensor([[[0.05, 3.0], [0.02, -5.0]]])


def test_the_squared_error_sums_over_dimension_one_alone() -> None:
    a, b = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
    assert float(squared_error(a, b)) == 3 * 4  # 3 entries of 2^2, the mean over the rest


def test_fbr_adds_inner_layers_and_nothing_else() -> None:
    def pair(value: float) -> tuple[list[Tensor], list[Tensor]]:
        return [torch.full((1, 2), value)], [torch.zeros(1, 2)]

    out, inner = pair(1.0), pair(3.0)
    assert float(block_loss(*out)) == 2
    assert float(fbr_loss(*out, *inner, gamma=0.5)) == 2 + 0.5 * 18
    assert float(fbr_loss(*out, [], [], gamma=0.5)) == 2
    assert float(fbr_loss(*out, *inner, gamma=0.0)) == 2


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_gradients_of_the_fbr_loss_are_finite_differences(gamma: float) -> None:
    """Two layers, activations float: d loss / d alpha of both, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, first, second = normal(4, 3), normal(5, 3), normal(2, 5)
    roundings = [Rounding.of(w, torch.full((len(w),), 0.3, dtype=torch.float64), 4)
                 for w in (first, second)]  # fmt: skip

    def loss(*alphas: Tensor) -> Tensor:
        a, b = (r.soft(alpha) for r, alpha in zip(roundings, alphas, strict=True))
        inner = x @ a.T
        return fbr_loss(
            [inner.tanh() @ b.T],
            [(x @ first.T).tanh() @ second.T],
            [inner],
            [x @ first.T],
            gamma,
        )

    start = [(r.initial_alpha() + 0.3).requires_grad_() for r in roundings]
    assert torch.autograd.gradcheck(loss, start)
    gradients = torch.autograd.grad(loss(*start), start)
    assert all(bool(g.abs().max() > 0) for g in gradients)


def test_steps_multiply_the_chosen_columns_of_every_row() -> None:
    table = torch.cat([TABLE, 2 * TABLE])
    steps = torch.tensor([[math.log(2.0)], [0.0]], requires_grad=True)
    changed = with_steps(table, [1], steps)
    assert float(changed[0, 1, 0].detach()) == pytest.approx(0.04)
    assert torch.equal(changed[:, 0], table[:, 0])
    assert torch.equal(changed[1], table[1])
    assert torch.equal(changed[..., 1], table[..., 1]), "a zero point moved"
    changed[..., 0].sum().backward()
    assert torch.allclose(steps.grad, changed[:, 1:2, 0].detach())


def test_the_step_gradient_is_that_of_lsq() -> None:
    """d x^ / d s = round(v/s) - v/s inside, q - z at the ends (arXiv 1902.08153); times s here."""
    x = torch.tensor([0.513, 100.0, -100.0])
    for k, value in enumerate(x):
        steps = torch.zeros(1, 1, requires_grad=True)
        row = with_steps(TABLE, [0], steps)[[0]]
        dropped_fake_quantize(value[None, None], row, 0, 8, 0.0).sum().backward()
        ratio = float(value) / 0.05
        expected = (round(ratio) - ratio, 127 - 3.0, -128 - 3.0)[k]
        assert float(steps.grad) == pytest.approx(expected * 0.05, rel=1e-3)


def test_the_regulariser_starts_after_the_warm_up_softens_and_grows() -> None:
    settings = Reconstruction(warmup=0.2, sharpness_from=20.0, sharpness_to=2.0)
    assert rounding_schedule(0.19, settings)[0] == 0
    assert rounding_schedule(0.2, settings)[1] == 20.0
    weights, exponents = zip(
        *(rounding_schedule(p / 100, settings) for p in range(20, 101)), strict=True
    )
    assert exponents == tuple(sorted(exponents, reverse=True))
    assert weights == tuple(sorted(weights))
    assert exponents[-1] == 2.0
    assert weights[-1] == pytest.approx(10 * settings.rounding_weight)
    off = Reconstruction(rounding_weight=0.0)
    assert not any(rounding_schedule(p / 10, off)[0] for p in range(11))


def test_dropping_leaves_values_untouched_at_the_rate_asked_for() -> None:
    x = torch.rand(100, 100) + 0.013
    torch.manual_seed(0)
    kept = (dropped_fake_quantize(x, TABLE, 0, 2, 0.3) == x).float().mean()
    assert float(kept) == pytest.approx(0.3, abs=0.02)
    assert bool((dropped_fake_quantize(x, TABLE, 0, 2, 1.0) == x).all())


def linear(drop: float | None) -> GraphModule:
    """A unit by hand: (x, row, weight) -> (output,), its activation quantised or not."""
    graph = Graph()
    x, row, weight = (graph.placeholder(name) for name in ("x", "row", "weight"))
    if drop is not None:
        x = graph.call_function(dropped_fake_quantize, (x, row, 0, 8, drop))
    graph.output((graph.call_function(torch.nn.functional.linear, (x, weight)),))
    return GraphModule(torch.nn.Module(), graph)


def trained(settings: Reconstruction, seed: int = 0, **options: float) -> tuple[object, UnitData]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator) / 4
    x = torch.randn(256, 16, generator=generator) @ mixing
    weight = torch.randn(8, 16, generator=generator)
    target = x @ weight.T
    data = UnitData(
        [x],
        [x],
        [True],
        lambda index, outputs_only=False: [target[index]],
        torch.zeros(256).long(),
        1,
    )
    graphs = UnitGraphs(*(linear(d) for d in (settings.drop, 0.0, None)))
    rounding = Rounding.of(weight, pnorm_weight_scale(weight, 4), 4)
    torch.manual_seed(seed)
    result = optimise(graphs, data, [rounding], TABLE.clone(), [0], settings, **options)
    return result, data


@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_training_lowers_the_loss_that_serving_sees(order: str) -> None:
    settings = Reconstruction(order=order, iters=300, lr_scale=1e-3)
    result, data = trained(settings)
    assert result.loss_after < 0.6 * result.loss_before
    assert result.iters == (300 if order == "joint" else 600)
    unit = linear(0.0)
    again = serving_loss(unit, data, result.weights, result.table, 32)
    assert again == pytest.approx(result.loss_after, rel=1e-5)
    assert torch.equal(result.table[:, 1], TABLE[:, 1]), "a quantiser of another unit changed"
    assert not torch.equal(result.table[:, 0], TABLE[:, 0])


def test_the_default_schedule_settles_almost_every_rounding() -> None:
    result, _ = trained(Reconstruction())
    assert result.settled >= 0.99


def test_without_the_regulariser_roundings_stay_open() -> None:
    result, _ = trained(Reconstruction(rounding_weight=0.0))
    assert result.settled < 0.9


def test_the_rate_of_steps_can_be_zero() -> None:
    result, _ = trained(Reconstruction(iters=20, lr_scale=0.0))
    assert torch.equal(result.table, TABLE)


def test_equal_seeds_give_equal_results() -> None:
    settings = Reconstruction(iters=50)
    (first, _), (second, _), (other, _) = (trained(settings, seed) for seed in (3, 3, 4))
    assert torch.equal(first.weights[0], second.weights[0])
    assert torch.equal(first.table, second.table)
    assert not torch.equal(first.table, other.table)


def test_a_time_budget_ends_training_early() -> None:
    result, _ = trained(Reconstruction(iters=100_000), seconds=0.3)
    assert 0 < result.iters < 100_000
    assert result.loss_after < result.loss_before
