"""Print a model's graph after a pass."""

from __future__ import annotations

import argparse
import json
import sys

from fxquant.cli.graphs import header, names, records_until
from fxquant.cli.model import add_model_arguments, load_model
from fxquant.graph.dump import dump, records
from fxquant.graph.options import Options
from fxquant.recipe import Recipe

EXAMPLE = "fxquant dump digits --after annotate --unit mid_block"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--after", metavar="PASS", default="select_kernels", help=f"one of {', '.join(names())}"
    )
    parser.add_argument(
        "--unit", metavar="U", help="only units or modules whose path starts with this"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
    made = records_until(
        load_model(options.model), Options(Recipe.parse(options.recipe)), options.after
    )
    last = made[-1]
    if options.json:
        nodes = records(last.graph, options.unit)
        json.dump(
            {"pass": last.name, "number": len(made) - 1, "nodes": nodes},
            sys.stdout,
            indent=1,
            default=str,
        )
        sys.stdout.write("\n")
    else:
        sys.stdout.write(header(len(made) - 1, last) + dump(last.graph, options.unit))
    return 0
