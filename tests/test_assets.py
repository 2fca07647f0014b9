"""The bundled models load, stay small and still do their job."""

from __future__ import annotations

import json

import pytest
import torch

import fxquant
from fxquant import assets
from fxquant.evaluate.digits import (
    balanced_labels,
    classifier_features,
    load_classifier,
    load_digits,
    load_split,
    recognition_rate,
    sample_digits,
)

WEIGHT_BUDGET = 5_000_000  # bytes, all bundled weights together


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cifar'.*digits"):
        assets.path("cifar")


@pytest.mark.parametrize("name", assets.NAMES)
def test_every_model_has_a_card(name: str) -> None:
    card = (assets.path(name) / "MODEL_CARD.md").read_text()
    assert "CC BY 4.0" in card


def test_weights_fit_the_budget() -> None:
    files = [f for name in assets.NAMES for f in assets.path(name).rglob("*.safetensors")]
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) <= WEIGHT_BUDGET


def test_unet_loads_as_float32_in_eval_mode() -> None:
    unet = assets.load_digits_unet()
    assert not unet.training
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    channels = unet.config["block_out_channels"]
    assert all(c % 16 == 0 for c in channels)
    x = torch.zeros(2, 1, 16, 16)
    assert unet(x, torch.tensor(10), class_labels=torch.tensor([3, 4])).sample.shape == x.shape


def test_scheduler_matches_the_training_schedule() -> None:
    scheduler = assets.load_digits_scheduler()
    stored = json.loads((assets.path("digits") / "scheduler/scheduler_config.json").read_text())
    assert scheduler.config["num_train_timesteps"] == stored["num_train_timesteps"] == 1000
    assert scheduler.config["beta_schedule"] == stored["beta_schedule"]


def test_digits_are_scaled_and_split_per_class() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 1, 16, 16)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    split = load_split()
    assert len(split.train_labels) + len(split.held_out_labels) == len(labels)
    share = split.held_out_labels.bincount() / labels.bincount()
    assert torch.allclose(share, torch.tensor(0.2), atol=0.01)


def test_classifier_reads_held_out_digits() -> None:
    split = load_split()
    assert recognition_rate(split.held_out_images, split.held_out_labels) >= 0.98
    assert classifier_features(split.held_out_images).shape == (359, 64)


def test_head_of_features_is_forward() -> None:
    images, model = load_split().held_out_images[:8], load_classifier()
    assert torch.equal(model(images), model.head(model.features(images)))


def test_recognition_rate_refuses_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[N, 1, 16, 16\]"):
        recognition_rate(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="one per image"):
        recognition_rate(torch.zeros(2, 1, 16, 16), torch.zeros(3))


def test_sampled_digits_are_recognised() -> None:
    labels = balanced_labels(20)
    images = sample_digits(
        assets.load_digits_unet(), assets.load_digits_scheduler(), labels, steps=20
    )
    assert images.shape == (200, 1, 16, 16)
    assert recognition_rate(images, labels) >= 0.9


def test_batch_size_does_not_change_the_images() -> None:
    unet, labels = assets.load_digits_unet(), balanced_labels(1)
    scheduler = assets.load_digits_scheduler()
    whole = sample_digits(unet, scheduler, labels, steps=5)
    parts = sample_digits(unet, scheduler, labels, steps=5, batch_size=3)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-3)


def test_the_bundled_w4a8_model_is_the_unet_with_int4_weights() -> None:
    unet, compiled = assets.load_digits_unet(), fxquant.load(assets.path("digits") / "w4a8")
    assert compiled.recipe.name == "w4a8-best"
    assert compiled.summary.precision["w4a8"] > 50
    assert compiled.summary.bytes_after < 0.15 * compiled.summary.bytes_before
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"class_labels": torch.arange(8), "return_dict": False}
    with torch.no_grad():
        exact, near = (model(x, torch.tensor(900), **call)[0] for model in (unet, compiled))
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.05
