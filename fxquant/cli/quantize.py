"""Compile a model and save the artefact.

An image model is calibrated on DDIM runs of its own. A model that reads prompts needs recorded
calls (--calib); without them it gets random inputs, and a warning.
"""

from __future__ import annotations

import argparse
import sys

import fxquant
from fxquant.cli.inputs import add_call_arguments, calls_for
from fxquant.cli.model import add_model_arguments, load_model
from fxquant.cli.output import check_writable, folder_named, show_json
from fxquant.compiler import check_backend, check_device
from fxquant.presets import TASKS
from fxquant.recipe import ATTENTION, Recipe
from fxquant.reconstruction.training import Training

EXAMPLE = "fxquant quantize digits --out digits-w8a8 --recipe w8a8-fast"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--out", type=folder_named, required=True, metavar="DIR", help="of the artefact"
    )
    add_call_arguments(parser)
    _add_training_arguments(parser)
    parser.add_argument(
        "--attention", choices=ATTENTION, help="precision of attention, instead of the recipe's"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse if anything would run slower than planned"
    )
    parser.add_argument("--backend", default="auto", help="kernel family, default %(default)s")
    parser.add_argument(
        "--device", default="cpu", help="where to compile: cpu or cuda; default %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """For recipes that reconstruct."""
    group = parser.add_argument_group("reconstruction (efforts balanced and best)")
    group.add_argument("--task", choices=[*TASKS], help="EDA-DM's published settings for a task")
    group.add_argument("--iters", type=int, metavar="N", help="optimiser steps of every unit")
    group.add_argument("--time-budget", type=float, metavar="S", help="seconds for all units")
    group.add_argument(
        "--memory-budget", type=float, metavar="GB", help="cached activations held in memory"
    )
    group.add_argument(
        "--resume", type=folder_named, metavar="DIR",
        help="keeps finished units, and goes on from there",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    out, backend = check_writable(options.out), check_backend(options.backend)
    device = check_device(options.device)
    recipe = Recipe.parse(options.recipe, options.task)
    recipe = recipe.with_(attention=options.attention or recipe.attention)
    gigabytes = options.memory_budget
    training = {
        "iters": options.iters,
        "time_budget": options.time_budget,
        "memory_budget": None if gigabytes is None else int(gigabytes * 1e9),
        "resume": options.resume,
    }
    Training(**training).apply(recipe)  # refuses before calls are recorded
    model = load_model(options.model)
    calls = calls_for(model, options.model, options)
    compiled = fxquant.compile(
        model.to(device),
        calls,
        recipe,
        backend=backend,
        seed=options.seed,
        strict=options.strict,
        **training,
    )
    compiled.save_pretrained(out)
    if options.json:
        show_json({"out": str(out), "summary": compiled.summary.to_json()})
    else:
        sys.stdout.write(f"{compiled.summary}\n{out}: saved; fxquant.load({str(out)!r}) loads it\n")
    return 0
