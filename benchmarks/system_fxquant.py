"""fxquant: compiled and saved by one process, loaded by another."""

from __future__ import annotations

from pathlib import Path

import torch
from common import build, reset_peak, run, timed
from served import Row, Served, Settings
from system_torch import nested

import fxquant
from fxquant.evaluate.profile import time_by_kind


def prepare(settings: Settings, place: Path, recipe: str, attention: str) -> None:
    """Compile and save."""
    torch.set_num_threads(settings.threads)
    calls = [nested(call) for call in settings.calibration()]
    chosen = fxquant.Recipe.parse(recipe).with_(attention=attention)
    model = fxquant.compile(build(settings.arch), calls, chosen, progress=False)
    model.save_pretrained(place)


def load(settings: Settings, place: Path) -> Served:
    """Load what was saved."""
    torch.set_num_threads(settings.threads)
    call = nested(settings.timed())
    reset_peak()
    model, seconds = timed(lambda: fxquant.load(place))

    def profile() -> list[Row]:
        tensors = model.signature.flatten((), call)
        return [(t.kind, t.calls, t.seconds) for t in time_by_kind(model, tensors, rounds=3)]

    return Served(lambda: run(model, call).numpy(), profile, {"load": seconds})
