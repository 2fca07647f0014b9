"""The stage between fake-quant and lower: choose samples, reconstruct, keep checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.calibration.select import select
from fxquant.errors import RecipeError
from fxquant.graph.dump import dump
from fxquant.graph.nodes import set_buffer
from fxquant.graph.runner import clone
from fxquant.graph.signature import Signature
from fxquant.graph.specialise import device_of
from fxquant.quant.table import ActivationTable
from fxquant.recipe import Recipe
from fxquant.reconstruction.checkpoint import Checkpoints, fingerprint, surroundings
from fxquant.reconstruction.reconstruct import (
    Reconstructed,
    bypassed,
    reconstruct,
)
from fxquant.reconstruction.stream import Samples


@dataclass(frozen=True)
class Training:
    """What a call of compile says about the reconstruction, beside its recipe; see there."""

    iters: int | None = None
    time_budget: float | None = None
    memory_budget: int | None = None
    resume: str | Path | None = None

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with these iterations.

        Raises:
            RecipeError: a budget that is none, or a recipe that does not reconstruct.
        """
        for name in ("time_budget", "memory_budget"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"{name}={value!r}; it is positive, or None")
        said = [name for name, value in vars(self).items() if value is not None]
        if said and recipe.reconstruction is None:
            raise RecipeError(
                f"recipe {recipe.name!r} does not reconstruct and cannot heed "
                f"{', '.join(said)}; effort 'balanced' or 'best' does"
            )
        if self.iters is None:
            return recipe
        return recipe.with_(reconstruction={"iters": self.iters})


def train(
    graph: GraphModule,
    table: ActivationTable,
    signature: Signature,
    calls: Sequence[Sequence[Tensor]],
    recipe: Recipe,
    training: Training,
    *,
    seed: int = 0,
    selected: bool = False,
    show: bool = False,
) -> Reconstructed:
    """Reconstruct a fake-quantised model on samples of its calibration calls.

    Args:
        recipe: one with a reconstruction.
        selected: the calls were chosen by record_selected; all of them train.
        show: a progress bar.
    """
    settings = recipe.reconstruction
    assert settings is not None, "a recipe without reconstruction"
    selection = select(
        bypassed(graph),
        signature,
        calls,
        settings.sampler,
        settings.samples,
        seed=seed,
        variety_weight=settings.variety_weight,
        threshold=settings.threshold,
        selected=selected,
    )
    times = selection.times.to(table.values.device)
    samples = Samples(selection.tensors, table.group(times).cpu(), selection.shared)
    checkpoints = None
    if training.resume is not None:
        run = {
            "recipe": recipe.to_json(),
            "seed": seed,
            "memory_budget": training.memory_budget,
            "time_budget": training.time_budget,
            **surroundings(),
            "device": device_of(graph).type,
            "graph": hashlib.sha256(dump(graph).encode()).hexdigest(),
            "model": fingerprint(dict(graph.state_dict()).values()),
            "ranges": fingerprint([table.values]),
            "samples": fingerprint([*samples.tensors, *samples.shared.values()]),
        }
        checkpoints = Checkpoints(training.resume, run)
    # compile() may well be called where gradients are off
    with torch.inference_mode(False), torch.enable_grad():
        return reconstruct(
            _for_autograd(graph),
            ActivationTable(table.values.clone(), table.timesteps.clone(), table.groups.clone()),
            Samples(
                tuple(t.clone() for t in samples.tensors),
                samples.rows.clone(),
                {k: t.clone() for k, t in samples.shared.items()},
            ),
            settings,
            seed=seed,
            memory_budget=training.memory_budget,
            time_budget=training.time_budget,
            checkpoints=checkpoints,
            show=show,
        )


def _for_autograd(graph: GraphModule) -> GraphModule:
    """A clone whose tensors may meet autograd: those made in inference mode never can."""
    result = clone(graph)
    for name, tensor in graph.state_dict(keep_vars=True).items():
        if tensor.is_inference():
            set_buffer(result, name, tensor.detach().clone())
    return result
