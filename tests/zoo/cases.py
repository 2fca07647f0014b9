"""Every case, from the files by family."""

from __future__ import annotations

from tests.zoo import (
    audio,
    controls,
    image_transformers,
    mixtures,
    packed_transformers,
    priors,
    unets,
    video_transformers,
    video_unets,
)
from tests.zoo.case import Case

CASES: tuple[Case, ...] = (
    *unets.CASES,
    *image_transformers.CASES,
    *packed_transformers.CASES,
    *video_unets.CASES,
    *video_transformers.CASES,
    *audio.CASES,
    *priors.CASES,
    *controls.CASES,
    *mixtures.CASES,
)
