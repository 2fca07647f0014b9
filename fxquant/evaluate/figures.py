"""Quality of a model against the float model: figures over digit images, or call by call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import EvaluationError
from fxquant.evaluate.digits import (
    CLASSES,
    IMAGE_SIZE,
    balanced_labels,
    classifier_features,
    classifier_maps,
    classifier_probabilities,
    load_digits,
    recognition_rate,
    sample_digits,
)
from fxquant.evaluate.distributions import (
    NEIGHBOURS,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)
from fxquant.evaluate.metrics import (
    fd_ratio,
    frechet_distance,
    mean_psnr,
    psnr,
    relative_l2,
    spatial_frechet_distance,
)
from fxquant.evaluate.ssim import mean_ssim
from fxquant.graph.flat_call import tensors_in
from fxquant.graph.results import joined, result_of
from fxquant.logs import progress

FEATURE = "penultimate layer of the bundled digits classifier, 64 numbers"
SPATIAL_FEATURE = "last convolution of the bundled digits classifier, 64 x 4 x 4"
CLASSIFIER = "classes read by the bundled digits classifier, 10"
STANDARD_IMAGES = 2000  # FD ratios at other N do not compare
LEAST_IMAGES = NEIGHBOURS + 1


@dataclass(frozen=True)
class DigitsFigures:
    """Figures over three sets of N images, sets of both models from equal noise.

    All are means over the sets. Names that end in _float are the float model's own figure.

    Attributes:
        images: N of every set.
        real_images: number of the real digits.
        steps: DDIM steps.
        seeds: of the three sets.
        feature: what FD, KID, precision and recall look at.
        spatial_feature: what the spatial FD looks at.
        classifier: what the classifier score and recognition look at.
        psnr: to the float model's images in dB, mean over images and sets.
        ssim: to the float model's images, mean over images and sets.
        fd_ratio, fd_ratio_min, fd_ratio_max: over the three pairs of sets; 1.0 is perfect.
        fd_real: FD to the real digits.
        spatial_fd: spatial FD to the real digits.
        kid: KID to the real digits, of all images. The labels are balanced, so the images are no
            independent draws and the estimate lies too low, by an amount that shrinks as 1 / N
            (about 2 at N = 40, 0.04 at 2,000): compare it with kid_float, not with zero.
        precision, recall: of the images against the real digits.
        classifier_score: the inception score's formula on `classifier`, in one split.
        recognition: fraction of images read as their label.
    """

    images: int
    real_images: int
    steps: int
    seeds: tuple[int, ...]
    feature: str
    spatial_feature: str
    classifier: str
    psnr: float
    ssim: float
    fd_ratio: float
    fd_ratio_min: float
    fd_ratio_max: float
    fd_real: float
    fd_real_float: float
    spatial_fd: float
    spatial_fd_float: float
    kid: float
    kid_float: float
    precision: float
    precision_float: float
    recall: float
    recall_float: float
    classifier_score: float
    classifier_score_float: float
    recognition: float
    recognition_float: float


def is_digits(model: nn.Module) -> bool:
    """Does the model make what the bundled classifier reads: 16x16 images of ten classes?"""
    config: Any = getattr(model, "config", None)
    wanted = {"in_channels": 1, "sample_size": IMAGE_SIZE, "num_class_embeds": CLASSES}
    return all(getattr(config, name, None) == value for name, value in wanted.items())


def check_digits(model: nn.Module) -> None:
    """Raise EvaluationError for a model whose images have no labels to check."""
    if not is_digits(model):
        raise EvaluationError(
            f"figures over images need class labels and a classifier that reads them, which exist "
            f"for 16x16 digits only; this {type(model).__name__} makes something else. Leave the "
            "number of images out to compare call by call"
        )


def digits_figures(
    model: nn.Module,
    reference: nn.Module,
    scheduler: Any,
    images: int = STANDARD_IMAGES,
    steps: int = 20,
    seed: int = 0,
    show: bool = False,
) -> DigitsFigures:
    """Sample both models with DDIM and compare.

    Args:
        images: N, 4 or more.
        seed: of the first of the three sets; the others follow.
        show: progress bars.

    Raises:
        EvaluationError: not models of digits, or fewer than four images.
    """
    check_digits(reference)
    if images < LEAST_IMAGES:
        raise EvaluationError(
            f"{images} image{'s' * (images != 1)} asked for; precision and recall look at the "
            f"{NEIGHBOURS} nearest others of each, which takes {LEAST_IMAGES} or more"
        )
    seeds = (seed, seed + 1, seed + 2)
    labels = balanced_labels(-(-images // CLASSES))[:images]

    def sets(of: nn.Module) -> list[Tensor]:
        return [
            sample_digits(of, scheduler, labels, steps=steps, seed=s, progress=show) for s in seeds
        ]

    made, exact = sets(model), sets(reference)
    real = load_digits()[0]
    ratios = _fd_ratios(made, exact)
    own, floats = (_mean_set_figures(s, labels, real) for s in (made, exact))
    return DigitsFigures(
        images=images,
        real_images=len(real),
        steps=steps,
        seeds=seeds,
        feature=FEATURE,
        spatial_feature=SPATIAL_FEATURE,
        classifier=CLASSIFIER,
        psnr=mean(mean_psnr(a, b) for a, b in zip(made, exact, strict=True)),
        ssim=mean(mean_ssim(a, b) for a, b in zip(made, exact, strict=True)),
        fd_ratio=mean(ratios),
        fd_ratio_min=min(ratios),
        fd_ratio_max=max(ratios),
        **own,
        **{f"{name}_float": value for name, value in floats.items()},
    )


def _fd_ratios(made: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of the pairs (0, 1), (1, 2), (2, 0) of sets."""
    features, floats = ([classifier_features(x) for x in s] for s in (made, exact))
    pairs = ((0, 1), (1, 2), (2, 0))
    return [fd_ratio(features[b], floats[b], floats[a]).ratio for a, b in pairs]


def _mean_set_figures(sets: Sequence[Tensor], labels: Tensor, real: Tensor) -> dict[str, float]:
    found = [_set_figures(images, labels, real) for images in sets]
    return {name: mean(f[name] for f in found) for name in found[0]}


def _set_figures(images: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
    """The figures that one set of images has by itself, by attribute of DigitsFigures."""
    features, target = classifier_features(images), classifier_features(real)
    manifolds = precision_recall(features, target)
    return {
        "fd_real": frechet_distance(features, target),
        "spatial_fd": spatial_frechet_distance(classifier_maps(images), classifier_maps(real)),
        "kid": kernel_inception_distance(features, target),
        "precision": manifolds.precision,
        "recall": manifolds.recall,
        "classifier_score": inception_score(classifier_probabilities(images), splits=1).mean,
        "recognition": recognition_rate(images, labels),
    }


@dataclass(frozen=True)
class CallFigures:
    """One call of both models on equal inputs.

    Attributes:
        timestep: of its first sample, None for a model without.
        psnr: in dB, mean over the samples; the range is that of the float output.
        relative_l2: ||output - float|| / ||float||.
    """

    timestep: float | None
    psnr: float
    relative_l2: float


def call_figures(
    model: nn.Module,
    reference: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    show: bool = False,
) -> list[CallFigures]:
    """Both models on every call.

    Raises:
        EvaluationError: their outputs have different shapes.
    """
    return [
        _call_figures(call, output(model, call), output(reference, call))
        for call in progress(calls, "compare", "call", show=show)
    ]


def output(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """The tensor that a model returns for a call, in whatever it is wrapped; several, joined."""
    with torch.no_grad():
        return joined(result_of(tensors_in(model(**call))[1]))


def _call_figures(call: Mapping[str, Any], made: Tensor, exact: Tensor) -> CallFigures:
    if made.shape != exact.shape:
        raise EvaluationError(
            f"the two models do not belong together: outputs {list(made.shape)} and "
            f"{list(exact.shape)} for one call"
        )
    made, exact = made.float(), exact.float()
    span = float(exact.max() - exact.min())
    timestep = call.get("timestep")
    return CallFigures(
        None if timestep is None else float(torch.as_tensor(timestep).reshape(-1)[0]),
        float(psnr(made, exact, span).mean()) if span > 0 else float("nan"),
        relative_l2(made, exact),
    )


def worst(figures: Iterable[CallFigures]) -> CallFigures:
    """The call with the largest error."""
    return max(figures, key=lambda f: f.relative_l2)
