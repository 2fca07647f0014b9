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
    load_digits,
    recognition_rate,
    sample_digits,
)
from fxquant.evaluate.metrics import fd_ratio, frechet_distance, mean_psnr, psnr, relative_l2
from fxquant.logs import progress

FEATURE = "penultimate layer of the bundled digits classifier, 64 numbers"
STANDARD_IMAGES = 2000  # FD ratios at other N do not compare


@dataclass(frozen=True)
class DigitsFigures:
    """Figures over three sets of N images, sets of both models from equal noise.

    Attributes:
        images: N of every set.
        steps: DDIM steps.
        seeds: of the three sets.
        feature: what the FD figures look at.
        psnr: to the float model's images in dB, mean over images and sets.
        fd_ratio, fd_ratio_min, fd_ratio_max: over the three pairs of sets; 1.0 is perfect.
        fd_real, fd_real_float: FD to the real digits, of this and of the float model, mean.
        recognition, recognition_float: fraction of images read as their label, mean.
    """

    images: int
    steps: int
    seeds: tuple[int, ...]
    feature: str
    psnr: float
    fd_ratio: float
    fd_ratio_min: float
    fd_ratio_max: float
    fd_real: float
    fd_real_float: float
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
        images: N, 2 or more.
        seed: of the first of the three sets; the others follow.
        show: progress bars.

    Raises:
        EvaluationError: not models of digits, or fewer than two images.
    """
    check_digits(reference)
    if images < 2:
        raise EvaluationError(f"{images} image asked for; a Frechet distance needs two or more")
    seeds = (seed, seed + 1, seed + 2)
    labels = balanced_labels(-(-images // CLASSES))[:images]

    def sets(of: nn.Module) -> list[Tensor]:
        return [
            sample_digits(of, scheduler, labels, steps=steps, seed=s, progress=show) for s in seeds
        ]

    made, exact = sets(model), sets(reference)
    features, floats = ([classifier_features(x) for x in s] for s in (made, exact))
    real = classifier_features(load_digits()[0])
    pairs = ((0, 1), (1, 2), (2, 0))
    ratios = [fd_ratio(features[b], floats[b], floats[a]).ratio for a, b in pairs]
    return DigitsFigures(
        images=images,
        steps=steps,
        seeds=seeds,
        feature=FEATURE,
        psnr=mean(mean_psnr(a, b) for a, b in zip(made, exact, strict=True)),
        fd_ratio=mean(ratios),
        fd_ratio_min=min(ratios),
        fd_ratio_max=max(ratios),
        fd_real=mean(frechet_distance(f, real) for f in features),
        fd_real_float=mean(frechet_distance(f, real) for f in floats),
        recognition=mean(recognition_rate(x, labels) for x in made),
        recognition_float=mean(recognition_rate(x, labels) for x in exact),
    )


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
    """The tensor that a model returns for a call, in whatever it is wrapped."""
    with torch.no_grad():
        result = model(**call)
    return result if isinstance(result, Tensor) else result[0]


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
