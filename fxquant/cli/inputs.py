"""The UNet calls that a command runs: recorded DDIM steps, a folder of calls, or random ones."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from fxquant.calibration import load_calls, record, sample_ddim
from fxquant.calibration.example import example_call
from fxquant.cli.model import load_scheduler
from fxquant.cli.output import folder_named
from fxquant.errors import ModelError

log = logging.getLogger(__name__)

Calls = list[dict[str, Any]]


def positive(text: str) -> int:
    """An argument that is a whole number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value


def add_call_arguments(parser: argparse.ArgumentParser, calls: int = 20, batch: int = 16) -> None:
    """--calls, --batch, --seed, --calib."""
    parser.add_argument(
        "--calls", type=positive, default=calls, metavar="N",
        help="UNet calls to calibrate on, spread over a DDIM run of as many steps, "
        "default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, default=batch, help="samples in a call, default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise, default %(default)s")
    parser.add_argument(
        "--calib", type=folder_named, metavar="DIR",
        help="use the calls in this folder instead (fxquant.calibration.save_calls writes it)",
    )  # fmt: skip


def calls_for(model: nn.Module, name: str, options: argparse.Namespace, seed: int = 0) -> Calls:
    """`options.calls` calls of the model that MODEL `name` gave.

    A UNet2DModel is sampled with DDIM, its classes in turn; anything that also reads a prompt gets
    random inputs, with a warning.

    Args:
        seed: added to the user's seed.

    Raises:
        LoaderError: --calib names no folder of calls.
        ModelError: no inputs can be made from the model's config.
    """
    if options.calib:
        return load_calls(options.calib)
    seed += options.seed
    if is_sampled(model):
        return record(model, lambda: _sample(model, name, options, seed))
    log.warning(
        "%s reads more than an image, a timestep and a class, so its calls are random numbers "
        "here: good for speed and for finding faults, but real ranges, and figures of quality, "
        "need recorded calls (--calib DIR)",
        type(model).__name__,
    )
    try:
        return [example_call(model, options.batch, seed=seed + k) for k in range(options.calls)]
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"no inputs can be made up for a {type(model).__name__}: {error}. Record calls of your "
            "pipeline, write them with fxquant.calibration.save_calls, and pass --calib DIR"
        ) from error


def is_sampled(model: nn.Module) -> bool:
    """Can calls of this model be had by sampling with DDIM?"""
    config: Any = getattr(model, "config", None)
    labels = getattr(config, "class_embed_type", None) is None
    return isinstance(model, UNet2DModel) and labels and bool(config.sample_size)


def _sample(model: nn.Module, name: str, options: argparse.Namespace, seed: int) -> None:
    classes = getattr(model.config, "num_class_embeds", None)
    labels = torch.arange(options.batch) % classes if classes else None
    sample_ddim(
        model,
        load_scheduler(name),
        class_labels=labels,
        count=options.batch,
        steps=options.calls,
        seed=seed,
        batch_size=options.batch,
        progress=True,
    )
