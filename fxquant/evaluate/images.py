"""Every figure that two sets of images can be given on this machine, each with its feature and N.

report = image_figures(quantised_images, float_images, prompts)
print(report)

Standard backbones serve where their weights are on disk, nothing is downloaded. Without Inception,
16x16 digits are seen by the bundled classifier; other images get no Frechet distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import EvaluationError
from fxquant.evaluate import backbones
from fxquant.evaluate.digits import (
    IMAGE_SIZE,
    classifier_features,
    classifier_maps,
    classifier_probabilities,
)
from fxquant.evaluate.distributions import (
    inception_score,
    kernel_inception_distance,
    precision_recall,
)
from fxquant.evaluate.figures import CLASSIFIER, FEATURE, SPATIAL_FEATURE
from fxquant.evaluate.metrics import frechet_distance, mean_psnr, spatial_frechet_distance
from fxquant.evaluate.ssim import mean_ssim

_PIXELS = "pixels"


@dataclass(frozen=True)
class Figure:
    """One figure: its name and value, what it looks at, and of how many images."""

    name: str
    value: float
    feature: str
    images: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} ({self.feature}, N = {self.images:,})"


@dataclass(frozen=True)
class ImageReport:
    """The figures, and for those that cannot be had what is missing and how to get it."""

    figures: tuple[Figure, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*map(str, self.figures), *(f"not available: {m}" for m in self.missing)])


def image_figures(
    images: Tensor, reference: Tensor, prompts: Sequence[str] | None = None
) -> ImageReport:
    """Compare images [N, 3 or 1, H, W] in [-1, 1] with a reference's of the same noise.

    PSNR, SSIM and LPIPS go image by image; FD, spatial FD, KID, precision and recall take the
    reference's images as the truth; the score, CLIP and aesthetic score are of `images` alone.

    Args:
        prompts: one an image, for the CLIP score.

    Raises:
        ValueError: unequal or empty shapes.
    """
    found = [
        Figure("PSNR, dB", mean_psnr(images, reference), _PIXELS, len(images)),
        Figure("SSIM", mean_ssim(images, reference), _PIXELS, len(images)),
    ]
    missing: list[str] = []
    for group in (_distributions, _lpips, _aesthetic):
        _attempt(found, missing, lambda group=group: group(images, reference))  # type: ignore[misc]
    if prompts is not None:
        _attempt(found, missing, lambda: _clip(images, prompts))
    return ImageReport(tuple(found), tuple(missing))


def _attempt(found: list[Figure], missing: list[str], group: Callable[[], list[Figure]]) -> None:
    try:
        found += group()
    except EvaluationError as error:
        missing.append(str(error))


def _distributions(images: Tensor, reference: Tensor) -> list[Figure]:
    names = [backbones.INCEPTION_FEATURE, backbones.INCEPTION_SPATIAL, backbones.INCEPTION_CLASSES]
    try:
        seen, truth = (backbones.inception_features(_rgb(x)) for x in (images, reference))
        parts = [(seen.pool, truth.pool), (seen.spatial, truth.spatial)]
        probabilities = seen.probabilities
    except EvaluationError:
        if images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise
        names = [FEATURE, SPATIAL_FEATURE, CLASSIFIER]
        of = (classifier_features, classifier_maps)
        parts = [(look(images), look(reference)) for look in of]
        probabilities = classifier_probabilities(images)
    (features, target), maps = parts
    manifolds = precision_recall(features, target)
    figures = [
        ("FD", frechet_distance(features, target), names[0]),
        ("spatial FD", spatial_frechet_distance(*maps), names[1]),
        ("KID", kernel_inception_distance(features, target), names[0]),
        ("precision", manifolds.precision, names[0]),
        ("recall", manifolds.recall, names[0]),
        ("inception-like score", inception_score(probabilities, splits=1).mean, names[2]),
    ]
    return [Figure(name, value, feature, len(images)) for name, value, feature in figures]


def _lpips(images: Tensor, reference: Tensor) -> list[Figure]:
    values = backbones.lpips(_rgb(images), _rgb(reference))
    return [Figure("LPIPS", float(values.mean()), "AlexNet", len(images))]


def _aesthetic(images: Tensor, reference: Tensor) -> list[Figure]:
    values = backbones.aesthetic_score(_rgb(images))
    return [
        Figure("aesthetic score", float(values.mean()), "CLIP ViT-L/14, LAION head", len(values))
    ]


def _clip(images: Tensor, prompts: Sequence[str]) -> list[Figure]:
    values = backbones.clip_score(_rgb(images), prompts)
    return [Figure("CLIP score", float(values.mean()), "CLIP", len(values))]


def _rgb(images: Tensor) -> Tensor:
    """Grey images three times."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else torch.as_tensor(images)
