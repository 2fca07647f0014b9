"""List the recipes, or show what one says; --json prints a recipe file."""

from __future__ import annotations

import argparse
from typing import Any

from fxquant.cli.output import show_json, show_table
from fxquant.errors import RecipeError
from fxquant.presets import EFFORTS, METHODS
from fxquant.recipe import BITS, Recipe, names

EXAMPLE = "fxquant recipe show w4a8-fast --json"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, text, example in (
        ("list", "every recipe name, and whether this version can run it", "fxquant recipe list"),
        ("show", "every field of one recipe", EXAMPLE),
    ):
        sub = actions.add_parser(action, help=text, description=text, epilog=f"example: {example}")
        sub.add_argument("--json", action="store_true", help="JSON instead of a table")
        if action == "show":
            sub.add_argument(
                "recipe", metavar="NAME", help="[method:]bits[-effort], or a recipe file (.json)"
            )


def run(options: argparse.Namespace) -> int:
    return _list(options.json) if options.action == "list" else _show(options.recipe, options.json)


def table() -> list[dict[str, Any]]:
    """name, and why_not: None for the recipes that this version can run; these come first."""
    rows = [{"name": name, "why_not": _why_not(name)} for name in names()]
    return sorted(rows, key=lambda row: row["why_not"] is not None)


def _why_not(name: str) -> str | None:
    try:
        Recipe.parse(name)
    except RecipeError as error:
        return str(error)
    return None


def _list(as_json: bool) -> int:
    rows = table()
    if as_json:
        show_json(rows)
        return 0
    ready = [Recipe.parse(row["name"]) for row in rows if row["why_not"] is None]
    show_table(
        "recipes that this version can run",
        ("name", "weight bits", "activation bits", "method", "effort"),
        [(r.name, str(r.weight_bits), str(r.activation_bits), r.method, r.effort) for r in ready],
    )
    print(
        f"The names are [method:]bits[-effort], with methods {', '.join(METHODS)}, bits "
        f"{', '.join(BITS)} and efforts {', '.join(EFFORTS)}; the {len(rows) - len(ready)} others "
        "are refused. --json says why."
    )
    return 0


def _show(name: str, as_json: bool) -> int:
    recipe = Recipe.parse(name)
    if as_json:
        show_json(recipe.to_json())
        return 0
    fields = recipe.to_json()
    overrides, training = fields.pop("overrides"), fields.pop("reconstruction")
    rows = [(field, _text(value)) for field, value in fields.items()]
    show_table(f"recipe {recipe.name}", ("field", "value"), rows, left=2)
    if training:
        rows = [(field, _text(value)) for field, value in training.items()]
        show_table("reconstruction of each unit", ("field", "value"), rows, left=2)
    if overrides:
        changed = [
            (o["pattern"], ", ".join(f"{k}={v}" for k, v in o.items() if k != "pattern"))
            for o in overrides
        ]
        show_table("overrides, later ones win", ("pattern", "changes"), changed, left=2)
    return 0


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
