"""One report for two sets of images: what there is is named, what is missing is said."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import EvaluationError
from fxquant.evaluate import backbones
from fxquant.evaluate.backbones import InceptionFeatures
from fxquant.evaluate.figures import FEATURE
from fxquant.evaluate.images import image_figures
from fxquant.evaluate.metrics import frechet_distance


@pytest.fixture(autouse=True)
def nothing_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""

    def missing(*_: object, **__: object) -> None:
        raise EvaluationError("the weights are missing; get them so")

    for name in ("inception_features", "lpips", "aesthetic_score", "clip_score"):
        monkeypatch.setattr(backbones, name, missing)


def images(size: int = 16, channels: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(12, channels, size, size, generator=generator) * 2 - 1


def test_digits_are_seen_by_the_classifier_without_inception() -> None:
    report = image_figures(images(), images(seed=1), prompts=["a digit"] * 12)
    by_name = {f.name: f for f in report.figures}
    assert by_name["FD"].feature == FEATURE
    assert by_name["FD"].value > 0
    assert {"PSNR, dB", "SSIM", "KID", "spatial FD", "precision", "recall"} <= by_name.keys()
    assert all(f.images == 12 for f in report.figures)
    assert len(report.missing) == 3, "LPIPS, aesthetic score, CLIP score"
    assert "N = 12" in str(report)
    assert "not available: the weights are missing; get them so" in str(report)


def test_other_images_get_no_distance_without_inception() -> None:
    report = image_figures(images(32, 3), images(32, 3, seed=1))
    assert [f.name for f in report.figures] == ["PSNR, dB", "SSIM"]
    assert len(report.missing) == 3


def test_inception_serves_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def features(x: torch.Tensor) -> InceptionFeatures:
        assert x.shape[1] == 3
        return InceptionFeatures(
            x.flatten(1)[:, :5], x[:, :, :4, :4], x.flatten(1)[:, :4].softmax(1)
        )

    monkeypatch.setattr(backbones, "inception_features", features)
    a, b = images(), images(seed=1)
    found = {f.name: f for f in image_figures(a, b).figures}
    assert found["FD"].feature == backbones.INCEPTION_FEATURE
    assert found["FD"].value == frechet_distance(a.flatten(1)[:, :5], b.flatten(1)[:, :5])
