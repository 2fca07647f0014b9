"""Where the weights of the standard evaluation networks lie. Nothing here, or below, downloads."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import EvaluationError

CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
_CLIP_FILES = (  # any one of each line will do
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("tokenizer.json", "vocab.json"),
)


def _torch_hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _emb_reader() -> Path:
    return Path.home() / ".cache" / "emb_reader"


@dataclass(frozen=True)
class WeightFile:
    """One file of weights.

    Attributes:
        title: what it is, for messages.
        name: of the file.
        url: where it comes from.
        folder: gives the folder in which the library that made it keeps it.
    """

    title: str
    name: str
    url: str
    folder: Callable[[], Path] = _torch_hub


INCEPTION = WeightFile(
    "FID's Inception network",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
ALEXNET = WeightFile(
    "LPIPS's AlexNet",
    "alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
VGG16 = WeightFile(
    "LPIPS's VGG-16",
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
)
AESTHETIC = WeightFile(
    "LAION's aesthetic head",
    "sa_0_4_vit_l_14_linear.pth",
    "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    folder=_emb_reader,
)


def require(package: str) -> Any:
    """The imported package.

    Raises:
        EvaluationError: not installed, or it does not import (then with its own message).
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"this figure needs {error.name}, which is not installed: pip install 'fxquant[eval]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise EvaluationError(f"{package} is installed but does not import: {error}") from error


def find(file: WeightFile, path: Path | None) -> Path:
    """The file at `path`, or where its library keeps it.

    Raises:
        EvaluationError: it is not there; names the place, the address and the command.
    """
    place = path or file.folder() / file.name
    if not place.is_file():
        raise EvaluationError(
            f"the weights of {file.title} are missing; looked for {place}. Nothing is downloaded "
            f"by itself. Get them with: curl -L --create-dirs -o '{place}' {file.url}"
        )
    return place


def load(file: WeightFile, path: Path | None) -> dict[str, Tensor]:
    """The tensors in the file, on the CPU.

    Raises:
        EvaluationError: it is not there, or is no file of tensors.
    """
    place = find(file, path)
    try:
        found = torch.load(place, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise EvaluationError(f"{place} holds no tensors (expected {file.url}): {error}") from error
    if not isinstance(found, Mapping):
        raise EvaluationError(f"{place} holds no dictionary of tensors (expected {file.url})")
    return dict(found)


def find_clip(folder: Path | None) -> Path:
    """The folder of a CLIP model in Hugging Face's layout: `folder`, or the snapshot in its cache.

    Raises:
        EvaluationError: no folder, or one that lacks files; names them and how to get them.
    """
    place = folder or _cached_clip()
    missing = [
        " or ".join(names)
        for names in _CLIP_FILES
        if not any((place / name).is_file() for name in names)
    ]
    if missing:
        target = f" --local-dir '{folder}'" if folder else ""
        raise EvaluationError(
            f"CLIP is missing {', '.join(missing)}; looked in {place}. Nothing is downloaded by "
            f"itself. Get it with: hf download {CLIP_REPOSITORY}{target}"
        )
    return place


def _cached_clip() -> Path:
    """The cached snapshot, or where it would be."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(CLIP_REPOSITORY, "config.json")
    if isinstance(config, str):
        return Path(config).parent
    return Path(constants.HF_HUB_CACHE) / f"models--{CLIP_REPOSITORY.replace('/', '--')}"
