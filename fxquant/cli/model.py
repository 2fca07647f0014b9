"""What MODEL means on the command line: a diffusers folder, an artefact, or a bundled name."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

import fxquant
from fxquant import assets
from fxquant.errors import ModelError, near
from fxquant.runtime.model import QuantizedModel

log = logging.getLogger(__name__)

ARTEFACT = "fxquant.json"  # the file that makes a folder an artefact


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and --recipe."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a saved diffusers folder, or a bundled name such as 'digits'",
    )
    parser.add_argument(
        "--recipe", default="w8a8-fast", help="recipe name or file, default %(default)s"
    )


def is_artefact(name: str) -> bool:
    """Is it the folder of a compiled model?"""
    return (Path(name) / ARTEFACT).is_file()


def load_any(name: str, backend: str = "auto") -> nn.Module:
    """The model that MODEL names, compiled if it is an artefact.

    Raises:
        ModelError: see `load_model`.
        ArtifactError: a damaged artefact.
    """
    return load_artefact(name, backend) if is_artefact(name) else load_model(name)


def load_artefact(name: str, backend: str = "auto") -> QuantizedModel:
    """Raises ArtifactError for a damaged one."""
    return fxquant.load(name, backend=backend)


def load_model(name: str) -> nn.Module:
    """The float denoiser that MODEL names, in float32 and eval mode.

    Raises:
        ModelError: neither a folder with a config.json nor a bundled name, or an artefact.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name in assets.NAMES:
            return assets.load_digits_unet()
        raise ModelError(f"{name!r} is no folder and no bundled model.{near(name, assets.NAMES)}")
    if is_artefact(name):
        raise ModelError(
            f"{folder} is a compiled artefact; this command starts from the float model that it "
            "was made of"
        )
    for place in (folder, folder / "unet", folder / "transformer"):
        if (place / "config.json").is_file():
            return _from_folder(place)
    raise ModelError(f"{folder} holds no config.json; save a model there with save_pretrained")


def load_scheduler(name: str) -> Any:
    """A DDIMScheduler with the noise schedule of MODEL's pipeline.

    A lone UNet folder has none: DDPM's own schedule serves then, with a warning.
    """
    folder = Path(name)
    if not folder.is_dir() and name in assets.NAMES:
        return assets.load_digits_scheduler()
    for place in (folder / "scheduler", folder.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            settings = json.loads((place / "scheduler_config.json").read_text())
            return diffusers.DDIMScheduler.from_config(settings)
    log.warning(
        "%s has no scheduler folder; sampling with the noise schedule of the first DDPM (linear, "
        "1,000 steps). Name the pipeline's folder if the model was trained with another.",
        folder,
    )
    return diffusers.DDIMScheduler()


def _from_folder(folder: Path) -> nn.Module:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name", "")
        frugal = importlib.util.find_spec("accelerate") is not None  # without it, asking only warns
        return (
            getattr(diffusers, kind)
            .from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=frugal)
            .eval()
        )
    except (AttributeError, OSError, ValueError) as error:
        raise ModelError(f"{folder} could not be loaded as a diffusers model: {error}") from error
