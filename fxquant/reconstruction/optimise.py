"""Optimises one unit: AdaRound for its weights, learned steps for its activations (LSQ).

The unit is given its inputs as the quantised prefix and as the float model produce them, and the
float model's results; fxquant.reconstruction.reconstruct says where these come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.quant.adaround import Rounding, regulariser, settled
from fxquant.quant.fake_quant import fake_quantize
from fxquant.reconstruction.cache import Stored
from fxquant.reconstruction.losses import block_loss, fbr_loss
from fxquant.reconstruction.settings import Reconstruction

Values = Tensor | Stored
OnIter = Callable[[], None]

_SHARP_BY = 0.8  # of the time after warm-up


@dataclass(frozen=True)
class UnitGraphs:
    """One unit as functions (*inputs, row, *weights) -> (*outputs, *inner layers).

    Attributes:
        training: activations quantised, some dropped (QDrop).
        serving: activations quantised.
        floats: activations float.
    """

    training: GraphModule
    serving: GraphModule
    floats: GraphModule


class Targets(Protocol):
    """The float model's results."""

    def __call__(self, index: Tensor, outputs_only: bool = False) -> Sequence[Tensor]:
        """Of some samples: the unit's outputs, then its inner layers unless only outputs count."""


@dataclass(frozen=True)
class UnitData:
    """A unit's samples, indexed by sample.

    Attributes:
        quantised, floats: its inputs from the quantised prefix and from the float model.
        mixed: whether the two are mixed for that input (time embeddings and conditions are not).
        targets: float outputs, then float inner layers, of the samples asked for.
        rows: table row of each sample, int64 [N].
        outputs: how many of the targets are outputs.
    """

    quantised: Sequence[Values]
    floats: Sequence[Values]
    mixed: Sequence[bool]
    targets: Targets
    rows: Tensor
    outputs: int

    def inputs(self, index: Tensor, drop: float, device: torch.device) -> list[Tensor]:
        """Inputs of some samples, values from the float model with probability `drop`."""
        found = []
        for q, f, mixed in zip(self.quantised, self.floats, self.mixed, strict=True):
            value = q[index].to(device)
            found.append(_mix(value, f[index].to(device), drop) if mixed and drop else value)
        return found


@dataclass(frozen=True)
class Result:
    """The unit after training, or as it was if training did not improve it.

    Attributes:
        weights: on the integer grid.
        table: activation parameters [G, n, 2] with the unit's learned steps.
        loss_before, loss_after: block loss over all samples on the inputs that serving sees, with
            weights rounded to nearest and with those learned.
        settled: fraction of roundings whose h ended within 0.01 of 0 or 1.
        iters: optimiser steps taken.
        seconds: that these took.
    """

    weights: list[Tensor]
    table: Tensor
    loss_before: float
    loss_after: float
    settled: float
    iters: int
    seconds: float


def optimise(
    graphs: UnitGraphs,
    data: UnitData,
    weights: Sequence[Rounding],
    table: Tensor,
    quantisers: Sequence[int],
    settings: Reconstruction,
    *,
    seconds: float | None = None,
    on_iter: OnIter | None = None,
) -> Result:
    """Train one unit; randomness comes from torch's global generator.

    Args:
        table: [G, n, 2] activation parameters; only the columns `quantisers` change.
        seconds: be done after as many, annealing faster if need be; None takes all iterations.
        on_iter: called after every step.
    """
    alphas = [w.initial_alpha().requires_grad_() for w in weights]
    batch = settings.batch
    steps = torch.zeros(len(table), len(quantisers), device=table.device, requires_grad=True)

    before = serving_loss(graphs.serving, data, [w.nearest() for w in weights], table, batch)
    # Relative, the two parts of the objective keep their balance in units whose outputs, or numbers
    # of weights, differ by magnitudes.
    scale, roundings = before or 1.0, sum(a.numel() for a in alphas)

    def loss(unit: GraphModule, index: Tensor, values: Sequence[Tensor]) -> Tensor:
        inputs = data.inputs(index, settings.drop, table.device)
        row = with_steps(table, quantisers, steps)[data.rows[index].to(table.device)]
        results, targets, k = unit(*inputs, row, *values), data.targets(index), data.outputs
        if settings.loss == "fbr":
            return fbr_loss(results[:k], targets[:k], results[k:], targets[k:], settings.gamma)
        return block_loss(results[:k], targets[:k])

    def soft(unit: GraphModule, index: Tensor, progress: float) -> Tensor:
        values = [w.soft(a) for w, a in zip(weights, alphas, strict=True)]
        total = loss(unit, index, values) / scale
        weight, exponent = rounding_schedule(progress, settings)
        if not weight:
            return total
        pull = torch.stack([regulariser(a, exponent) for a in alphas]).sum()
        return total + weight / roundings * pull

    def hard(unit: GraphModule, index: Tensor, progress: float) -> Tensor:
        return loss(unit, index, [w.hard(a) for w, a in zip(weights, alphas, strict=True)])

    learn_rounding = {"params": alphas, "lr": settings.lr_weight}
    learn_steps = {"params": [steps], "lr": settings.lr_scale}
    if settings.order == "joint":
        phases = [(partial(soft, graphs.training), [learn_rounding, learn_steps])]
    else:
        phases = [(partial(soft, graphs.floats), [learn_rounding])]
        phases += [(partial(hard, graphs.training), [learn_steps])] * bool(quantisers)
    started = time.perf_counter()
    share = None if seconds is None else seconds / len(phases)
    iters = [
        _train(objective, groups, settings, len(data.rows), share, on_iter)
        for objective, groups in phases
    ]
    trained = time.perf_counter() - started
    learned = with_steps(table, quantisers, steps).detach()
    rounded = [w.hard(a).detach() for w, a in zip(weights, alphas, strict=True)]
    after = serving_loss(graphs.serving, data, rounded, learned, batch)
    if not after < before:  # too few iterations, or too high a rate: better none of it
        rounded, learned, after = [w.nearest() for w in weights], table, before
    return Result(
        weights=rounded,
        table=learned,
        loss_before=before,
        loss_after=after,
        settled=float(torch.cat([settled(a).flatten() for a in alphas]).float().mean()),
        iters=sum(iters),
        seconds=trained,
    )


def dropped_fake_quantize(x: Tensor, row: Tensor, index: int, bits: int, drop: float) -> Tensor:
    """fake_quantize with some values passing untouched (QDrop); for training only."""
    quantised = fake_quantize(x, row, index, bits)
    return torch.where(torch.rand_like(x) < drop, x, quantised) if drop else quantised


def with_steps(table: Tensor, quantisers: Sequence[int], steps: Tensor) -> Tensor:
    """The table with some scales multiplied by exp(steps): [G, n, 2], differentiable."""
    if not len(quantisers):
        return table
    columns = torch.tensor(list(quantisers), device=table.device)
    factor = torch.zeros_like(table[..., 0]).index_copy(1, columns, steps).exp()
    return table * torch.stack([factor, torch.ones_like(factor)], dim=-1)


def rounding_schedule(progress: float, settings: Reconstruction) -> tuple[float, float]:
    """The regulariser's weight and exponent at a point of training, 0 to 1.

    No weight during warm-up. The exponent falls along a cosine and is down after four fifths: the
    last fifth, with low rates, only finishes what is nearly decided. The weight grows a
    hundredfold, from a tenth of what the settings say: undecided roundings follow the
    reconstruction first and must decide in the end.
    """
    if progress < settings.warmup:
        return 0.0, settings.sharpness_from
    done = (progress - settings.warmup) / max(1e-12, 1 - settings.warmup)
    high, low = settings.sharpness_from, settings.sharpness_to
    exponent = low + (high - low) * _cosine(min(1.0, done / _SHARP_BY))
    return settings.rounding_weight * 10 ** (2 * done - 1), exponent


@torch.no_grad()
def serving_loss(
    unit: GraphModule,
    data: UnitData,
    weights: Sequence[Tensor],
    table: Tensor,
    batch: int,
) -> float:
    """Block loss over all samples, on the inputs that serving will see."""
    total = 0.0
    for index in torch.arange(len(data.rows)).split(batch):
        inputs = data.inputs(index, 0.0, table.device)
        results = unit(*inputs, table[data.rows[index].to(table.device)], *weights)
        k = data.outputs
        total += float(block_loss(results[:k], data.targets(index, outputs_only=True))) * len(index)
    return total / len(data.rows)


def _train(
    objective: Callable[[Tensor, float], Tensor],
    groups: Sequence[dict[str, Any]],
    settings: Reconstruction,
    samples: int,
    seconds: float | None,
    on_iter: OnIter | None,
) -> int:
    """Minimise objective(sample indices, progress in [0, 1)); returns the steps taken."""
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam([dict(group) for group in groups])
    learned = [parameter for group in groups for parameter in group["params"]]
    started = time.perf_counter()
    for iteration in range(settings.iters):
        progress = iteration / settings.iters
        if seconds is not None:
            progress = max(progress, (time.perf_counter() - started) / max(1e-9, seconds))
        if progress >= 1:
            return iteration
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _cosine(progress)
        index = torch.randint(samples, (settings.batch,))
        # backward() would also leave gradients on the biases and norms of the user's model
        gradients = torch.autograd.grad(objective(index, progress), learned, allow_unused=True)
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if on_iter:
            on_iter()
    return settings.iters


def _cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _mix(quantised: Tensor, floats: Tensor, drop: float) -> Tensor:
    return torch.where(torch.rand_like(quantised) < drop, floats, quantised)
