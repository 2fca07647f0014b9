"""Figures of quality: perfect for a perfect model, worse for a damaged one, or refused."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fxquant import assets
from fxquant.errors import EvaluationError
from fxquant.evaluate.digits import load_digits
from fxquant.evaluate.figures import (
    _set_figures,
    call_figures,
    digits_figures,
    is_digits,
    worst,
)
from tests.runtime.compiled import float_toy


@functools.cache
def unet() -> nn.Module:
    return assets.load_digits_unet()


def figures(model: nn.Module, images: int = 20):
    scheduler = assets.load_digits_scheduler()
    return digits_figures(model, unet(), scheduler, images, steps=2, seed=5)


PAIRED = (
    "fd_real", "spatial_fd", "kid", "precision", "recall", "classifier_score", "recognition",
)  # fmt: skip


def test_a_model_equals_itself():
    found = figures(unet())
    assert (found.images, found.steps, found.seeds) == (20, 2, (5, 6, 7))
    assert found.psnr == float("inf")
    assert (found.fd_ratio, found.fd_ratio_min, found.fd_ratio_max) == (1.0, 1.0, 1.0)
    assert found.ssim == pytest.approx(1.0)
    for name in PAIRED:
        assert getattr(found, name) == getattr(found, f"{name}_float"), name
    assert found.fd_real > 0
    assert found.real_images == 1797
    for feature in (found.feature, found.spatial_feature, found.classifier):
        assert "bundled digits classifier" in feature


def test_a_damaged_model_is_worse():
    damaged = copy.deepcopy(unet())
    with torch.no_grad():
        damaged.conv_out.weight *= 0.3
    found = figures(damaged)
    assert found.psnr < 25
    assert found.fd_ratio_min <= found.fd_ratio <= found.fd_ratio_max
    assert found.fd_ratio > 1.1
    assert found.ssim < 0.95
    for name in ("fd_real", "spatial_fd", "kid"):
        assert getattr(found, name) > getattr(found, f"{name}_float"), name
    assert found.precision < found.precision_float


def test_digits_are_told_from_other_models():
    assert is_digits(unet())
    assert not is_digits(float_toy())
    assert not is_digits(nn.Linear(1, 1))


def test_images_without_labels_are_refused_with_the_way_out():
    with pytest.raises(EvaluationError, match=r"need class labels .* ToyUNet .* call by call"):
        digits_figures(float_toy(), float_toy(), None)


def test_real_digits_are_near_perfect_by_themselves():
    images, labels = load_digits()
    found = _set_figures(images, labels, images)
    assert (found["fd_real"], found["spatial_fd"]) == pytest.approx((0, 0), abs=1e-6)
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert found["kid"] < 0  # only across the sets does an image meet itself
    assert found["recognition"] > 0.98
    assert 7 < found["classifier_score"] < 8  # trained on smoothed labels, it is never quite sure


@pytest.mark.parametrize(("images", "said"), [(1, "1 image asked"), (3, "3 images asked")])
def test_too_few_images_are_refused(images, said):
    with pytest.raises(EvaluationError, match=rf"{said} for; .* takes 4 or more"):
        figures(unet(), images=images)


class Scale(nn.Module):
    """sample * factor, bare or wrapped."""

    def __init__(self, factor: float, wrap: bool = False):
        super().__init__()
        self.factor, self.wrap = factor, wrap

    def forward(self, sample: Tensor, timestep: Tensor | None = None):
        result = sample * self.factor
        return (result,) if self.wrap else result


def test_calls_are_compared_on_equal_inputs():
    sample = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    calls = [{"sample": sample, "timestep": torch.tensor([7, 8])}, {"sample": 2 * sample}]
    first, second = call_figures(Scale(1.5), Scale(1.0, wrap=True), calls)
    assert (first.timestep, second.timestep) == (7.0, None)
    assert first.relative_l2 == pytest.approx(0.5)
    mse = [(0 + 0.25) / 2, (1 + 4) / 2]
    expected = sum(10 * torch.log10(torch.tensor(16 / m)).item() for m in mse) / 2
    assert first.psnr == pytest.approx(expected)
    assert second.psnr == pytest.approx(expected)  # the range scales with the output


def test_the_worst_call_has_the_largest_error():
    rows = [SimpleNamespace(relative_l2=x) for x in (0.1, 0.3, 0.2)]
    assert worst(rows) is rows[1]  # type: ignore[arg-type,comparison-overlap]


def test_models_that_do_not_belong_together_are_refused():
    class Half(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample[:, :1]

    with pytest.raises(EvaluationError, match=r"do not belong together: outputs \[2, 1\]"):
        call_figures(Half(), Scale(1.0), [{"sample": torch.ones(2, 2)}])
