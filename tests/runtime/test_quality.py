"""The bundled digits model keeps its images: the acceptance figure of the whole compiler."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from fxquant import assets
from fxquant.calibration import record
from fxquant.evaluate.digits import balanced_labels, recognition_rate, sample_digits
from fxquant.evaluate.metrics import mean_psnr
from tests.runtime import compiled as c

pytestmark = pytest.mark.slow

LABELS = balanced_labels(7)[:64]


def images(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return sample_digits(model, assets.load_digits_scheduler(), LABELS, steps=50, seed=0)


@functools.cache
def original() -> tuple[nn.Module, Tensor]:
    model = assets.load_digits_unet()
    return model, images(model)


@functools.cache
def calibration() -> list[c.Call]:
    """A short run with other noise and another number of steps."""
    model, scheduler = original()[0], assets.load_digits_scheduler()
    labels = balanced_labels(2)
    return record(model, lambda: sample_digits(model, scheduler, labels, steps=20, seed=1000))


@pytest.mark.parametrize(("recipe", "decibels"), [("w8a8-fast", 38.0), ("w4a8-fast", 20.0)])
def test_images_stay_near_the_originals(recipe: str, decibels: float) -> None:
    model, expected = original()
    quantised = c.compiled(model, calibration(), recipe)
    painted = images(quantised)
    figure = mean_psnr(painted, expected)
    print(f"{recipe}: {figure:.2f} dB over {len(LABELS)} images")
    assert figure >= decibels
    if recipe == "w8a8-fast":
        assert recognition_rate(painted, LABELS) >= recognition_rate(expected, LABELS) - 0.05


def test_another_sampler_seed_is_much_farther() -> None:
    model, expected = original()
    scheduler = assets.load_digits_scheduler()
    with torch.no_grad():
        other = sample_digits(model, scheduler, LABELS, steps=50, seed=1)
    assert mean_psnr(other, expected) < 20.0
