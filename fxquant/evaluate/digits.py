"""The bundled evaluation data: 16x16 handwritten digits, their classifier and a DDIM sampler.

The images are scikit-learn's `load_digits` (1,797 images of 8x8, read from the installed package,
nothing is downloaded), upsampled to 16x16 and scaled to [-1, 1], where -1 is the background.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant import assets
from fxquant.calibration import sample_ddim

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

IMAGE_SIZE = 16
CLASSES = 10
FEATURES = 64
SPLIT_SEED = 0
HELD_OUT_FRACTION = 0.2
_GREY_LEVELS = 16  # load_digits stores ink as 0..16


class DigitsSplit(NamedTuple):
    """Images [N, 1, 16, 16] float32 in [-1, 1] and labels [N] int64, for train and held-out."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


class DigitsClassifier(nn.Module):
    """A small CNN for 16x16 digits; its penultimate layer gives the features of the FD figures."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_conv_stage(1, 16),  # 16x16 -> 8x8
            *_conv_stage(16, 32),  # 8x8 -> 4x4
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.embed = nn.Linear(64 * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 1, 16, 16] in [-1, 1] -> penultimate features [N, 64], after the ReLU."""
        return F.relu(self.embed(self.trunk(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 1, 16, 16] in [-1, 1] -> logits [N, 10]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _conv_stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)


def load_digits() -> tuple[Tensor, Tensor]:
    """All digits: images [1797, 1, 16, 16] float32 in [-1, 1], labels [1797] int64.

    Needs scikit-learn, which ships the images; raises ImportError without it.
    """
    from sklearn import datasets  # optional dependency: only evaluation on real digits needs it

    raw = datasets.load_digits()
    small = torch.tensor(raw.images, dtype=torch.float32)[:, None] / (_GREY_LEVELS / 2) - 1
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return large.clamp(-1, 1), torch.tensor(raw.target, dtype=torch.int64)


@lru_cache(maxsize=1)
def load_split() -> DigitsSplit:
    """The fixed split: 20 % of each class held out, drawn with seed 0. Do not edit the tensors."""
    images, labels = load_digits()
    held_out = _held_out_mask(labels)
    return DigitsSplit(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def _held_out_mask(labels: Tensor) -> Tensor:
    """Labels [N] -> bool [N]. RandomState, because NumPy freezes its stream across versions."""
    random = np.random.RandomState(SPLIT_SEED)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(CLASSES):
        members = (labels == digit).nonzero()[:, 0].numpy()
        count = round(HELD_OUT_FRACTION * len(members))
        mask[torch.from_numpy(random.permutation(members)[:count])] = True
    return mask


@lru_cache(maxsize=1)
def load_classifier() -> DigitsClassifier:
    """The bundled classifier, float32, on the CPU, in eval mode. One shared instance."""
    model = DigitsClassifier()
    model.load_state_dict(load_file(assets.path("digits") / "classifier" / "model.safetensors"))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def classifier_features(images: Tensor, classifier: DigitsClassifier | None = None) -> Tensor:
    """Images [N, 1, 16, 16] in [-1, 1] -> features [N, 64] float32, for `frechet_distance`."""
    _check_images(images)
    model = classifier or load_classifier()
    return torch.cat([model.features(part.float().cpu()) for part in images.split(500)])


@torch.no_grad()
def classifier_maps(images: Tensor, classifier: DigitsClassifier | None = None) -> Tensor:
    """Images [N, 1, 16, 16] in [-1, 1] -> last convolution's maps [N, 64, 4, 4], after the ReLU."""
    _check_images(images)
    convolutions = (classifier or load_classifier()).trunk[:-1]  # all but the flattening
    return torch.cat([convolutions(part.float().cpu()) for part in images.split(500)])


@torch.no_grad()
def classifier_probabilities(images: Tensor, classifier: DigitsClassifier | None = None) -> Tensor:
    """Images [N, 1, 16, 16] in [-1, 1] -> class probabilities [N, 10] float32."""
    model = classifier or load_classifier()
    return model.head(classifier_features(images, model)).softmax(dim=1)


@torch.no_grad()
def recognition_rate(
    images: Tensor, labels: Tensor, classifier: DigitsClassifier | None = None
) -> float:
    """The fraction in [0, 1] of images [N, 1, 16, 16] that the classifier reads as labels [N]."""
    _check_images(images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be [{len(images)}], one per image, got {list(labels.shape)}")
    model = classifier or load_classifier()
    read = model.head(classifier_features(images, model)).argmax(dim=1)
    return float((read == labels.cpu()).double().mean())


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE) or not len(images):
        raise ValueError(f"images must be [N, 1, 16, 16] with N >= 1, got {list(images.shape)}")


def balanced_labels(per_class: int) -> Tensor:
    """Labels [10 * per_class] int64, cycling 0..9, so that every prefix is nearly balanced."""
    return torch.arange(CLASSES).repeat(per_class)


def sample_digits(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    labels: Tensor,
    *,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 250,
    progress: bool = False,
) -> Tensor:
    """DDIM (eta 0) images [N, 1, 16, 16] in [-1, 1] for labels [N]; see `sample_ddim`."""
    images = sample_ddim(
        unet,
        scheduler,
        class_labels=labels,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return images.clamp(-1, 1)
