"""What MODEL means on the command line: a saved diffusers folder or a bundled name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
from torch import nn

from fxquant import assets
from fxquant.errors import ModelError, near


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and --recipe."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a saved diffusers folder, or a bundled name such as 'digits'",
    )
    parser.add_argument("--recipe", default="w8a8-fast", help="recipe name, default %(default)s")


def load_model(name: str) -> nn.Module:
    """The denoiser that MODEL names, in float32 and eval mode.

    Raises:
        ModelError: neither a folder with a config.json nor a bundled name.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name in assets.NAMES:
            return assets.load_digits_unet()
        raise ModelError(f"{name!r} is no folder and no bundled model.{near(name, assets.NAMES)}")
    for place in (folder, folder / "unet", folder / "transformer"):
        if (place / "config.json").is_file():
            return _from_folder(place)
    raise ModelError(f"{folder} holds no config.json; save a model there with save_pretrained")


def _from_folder(folder: Path) -> nn.Module:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name", "")
        return getattr(diffusers, kind).from_pretrained(folder, local_files_only=True).eval()
    except (AttributeError, OSError, ValueError) as error:
        raise ModelError(f"{folder} could not be loaded as a diffusers model: {error}") from error
