"""List the passes in the order they run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fxquant.passes import pipelines

EXAMPLE = "fxquant passes --json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")


def run(options: argparse.Namespace) -> int:
    rows = table()
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return 0
    width = max(len(row["pass"]) for row in rows)
    for row in rows:
        sys.stdout.write(f"{row['number']:02d} {row['pass']:{width}}  {row['summary']}\n")
        sys.stdout.write(f"   {'':{width}}  here because: {row['reason']}\n")
    return 0


def table() -> list[dict[str, Any]]:
    """number, pass, stage, summary (first line of its module) and reason of every pass."""
    return [
        {
            "number": number,
            "pass": step.name,
            "folder": step.rewrite.__module__.split(".")[-2],
            "stage": step.stage,
            "summary": (sys.modules[step.rewrite.__module__].__doc__ or "").splitlines()[0],
            "reason": step.reason,
        }
        for number, step in enumerate(pipelines.ALL, start=1)
    ]
