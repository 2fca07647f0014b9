"""Show what a pass, or a range of passes, changed in a model's graph."""

from __future__ import annotations

import argparse
import sys

from fxquant.cli.graphs import CAPTURE, names, records_until
from fxquant.cli.model import add_model_arguments, load_model
from fxquant.errors import PassError, near
from fxquant.graph.dump import diff, dump
from fxquant.graph.options import Options
from fxquant.recipe import Recipe

EXAMPLE = "fxquant diff digits --after fuse_producers --unit mid_block"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--after", metavar="PASS", required=True, help=f"one of {', '.join(names()[1:])}"
    )
    parser.add_argument(
        "--since",
        metavar="PASS",
        help="compare with the graph after this pass, default the one before",
    )
    parser.add_argument(
        "--unit", metavar="U", help="only units or modules whose path starts with this"
    )


def run(options: argparse.Namespace) -> int:
    made = records_until(
        load_model(options.model), Options(Recipe.parse(options.recipe)), options.after
    )
    before = _index([r.name for r in made], options.since) if options.since else len(made) - 2
    if before < 0:
        raise PassError(
            f"nothing comes before {CAPTURE}; `fxquant dump --after {CAPTURE}` shows it"
        )
    texts = [dump(made[k].graph, options.unit) for k in (before, len(made) - 1)]
    text = diff(texts[0], texts[1], (made[before].name, made[-1].name))
    sys.stdout.write(text)
    return 1 if text else 0


def _index(done: list[str], name: str) -> int:
    if name not in done:
        raise PassError(f"{name!r} does not run before {done[-1]}.{near(name, done)}")
    return done.index(name)
