"""How units are reconstructed: one frozen record, the `reconstruction` field of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fxquant.calibration.samplers import SAMPLERS
from fxquant.errors import RecipeError, near

LOSSES = ("layer", "block", "fbr")
ORDERS = ("joint", "sequential")


@dataclass(frozen=True)
class Reconstruction:
    """Calibration samples, loss and optimiser of the reconstruction. Rates anneal along a cosine.

    Attributes:
        sampler: which UNet calls train: "tdac", "uniform", "normal" or "random".
        samples: how many, N.
        variety_weight: TDAC's lambda.
        threshold: TDAC's epsilon; None takes the 25 % quantile of the pairwise distances.
        loss: "fbr" (the unit's output plus gamma times its inner layers), "block" (the output
            alone) or "layer" (every layer is a unit of its own).
        gamma: weight of the inner layers in "fbr".
        order: "joint", or "sequential": weights first, with float activations, then steps.
        iters: optimiser steps a unit (sequential: for the weights, and again for the steps).
        batch: samples a step.
        lr_weight: Adam's rate for AdaRound's alpha.
        lr_scale: Adam's rate for the logarithm of the activation steps; 0 leaves them as
            calibrated.
        rounding_weight: of AdaRound's regulariser, a mean over the unit's weights, against a
            loss in units of that before training; grows from a tenth to ten times this. 0
            switches it off.
        warmup: fraction of the iterations before the regulariser starts.
        sharpness_from, sharpness_to: exponent of the regulariser, along a cosine over the first
            four fifths of the rest.
        drop: probability that an activation passes unquantised, and that a value of the unit's
            input is the float model's (QDrop, arXiv 2203.05740).
    """

    sampler: str = "tdac"
    samples: int = 256
    variety_weight: float = 1.2
    threshold: float | None = None
    loss: str = "fbr"
    gamma: float = 0.8
    order: str = "joint"
    iters: int = 200
    batch: int = 32
    lr_weight: float = 0.5
    lr_scale: float = 1e-3
    rounding_weight: float = 1000.0
    warmup: float = 0.2
    sharpness_from: float = 20.0
    sharpness_to: float = 2.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("sampler", tuple(SAMPLERS)), ("loss", LOSSES), ("order", ORDERS)):
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(f"unknown {name} {value!r}.{near(str(value), known)}")
        for name in ("samples", "iters", "batch"):
            _check(name, getattr(self, name), int, lambda v: v >= 1, "a number of 1 or more")
        for name in ("lr_weight", "sharpness_from", "sharpness_to"):
            _check(name, getattr(self, name), float, lambda v: v > 0, "positive")
        for name in ("variety_weight", "gamma", "lr_scale", "rounding_weight"):
            _check(name, getattr(self, name), float, lambda v: v >= 0, "0 or more")
        for name in ("warmup", "drop"):
            _check(name, getattr(self, name), float, lambda v: 0 <= v <= 1, "between 0 and 1")
        if self.threshold is not None:
            _check("threshold", self.threshold, float, lambda v: v >= 0, "0 or more, or None")

    def to_json(self) -> dict[str, Any]:
        """Every field as plain data."""
        return asdict(self)


def _check(name: str, value: Any, kind: type, good: Callable[[Any], bool], wanted: str) -> None:
    numbers = (int,) if kind is int else (int, float)
    finite = isinstance(value, numbers) and not isinstance(value, bool) and abs(value) < 1e12
    if not finite or not good(value):
        raise RecipeError(f"reconstruction {name}={value!r}; it is {wanted}")
