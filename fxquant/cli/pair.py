"""MODEL as a compiled model, beside the float model it is held against."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from torch import nn

import fxquant
from fxquant.cli.inputs import Calls, calls_for
from fxquant.cli.model import is_artefact, load_any, load_artefact, load_model
from fxquant.compiler import check_backend
from fxquant.recipe import Recipe
from fxquant.runtime.model import QuantizedModel


@dataclass(frozen=True)
class Pair:
    """A compiled model, what it is compared with (or None), and the MODEL that is."""

    compiled: QuantizedModel
    reference: nn.Module | None
    name: str


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --recipe, --against, --backend."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact, or a diffusers folder or bundled name, which is compiled first",
    )
    parser.add_argument(
        "--recipe", default="w8a8-fast", help="if MODEL is compiled first, default %(default)s"
    )
    parser.add_argument(
        "--against", metavar="MODEL", help="what to compare with, default MODEL if it is float"
    )
    parser.add_argument("--backend", default="auto", help="kernel family, default %(default)s")


def reference_of(options: argparse.Namespace) -> nn.Module | None:
    """The model to compare with: --against, or MODEL if it is float."""
    if options.against:
        return load_any(options.against)
    return None if is_artefact(options.model) else load_model(options.model)


def compiled_of(
    options: argparse.Namespace, reference: nn.Module | None, calls: Calls | None = None
) -> Pair:
    """MODEL loaded, or compiled on `calls` (on calls of its own by default)."""
    recipe, backend = Recipe.parse(options.recipe), check_backend(options.backend)
    name = options.against or options.model
    if is_artefact(options.model):
        return Pair(load_artefact(options.model, backend), reference, name)
    floats = load_model(options.model) if options.against or not reference else reference
    if calls is None:
        calls = calls_for(floats, options.model, options)
    seed = getattr(options, "seed", 0)  # bench has none
    compiled = fxquant.compile(floats, calls, recipe, backend=backend, seed=seed)
    return Pair(compiled, reference, name)
