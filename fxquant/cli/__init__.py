"""The fxquant command: one file per verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxquant import logs
from fxquant._version import __version__
from fxquant.cli import (
    bench,
    bisect,
    diff,
    doctor,
    dump,
    explain,
    kernels,
    passes,
    quantize,
    recipe,
)
from fxquant.cli import eval as evaluate
from fxquant.errors import FxquantError

VERBS = (
    quantize, evaluate, bench, bisect, explain, recipe, passes, dump, diff, kernels, doctor,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0 done, 1 a difference or a miss, 2 an error."""
    options = parser().parse_args(arguments)
    try:
        logs.configure()
        return int(options.run(options))
    except FxquantError as error:
        print(f"fxquant: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a long dump closed it
        sys.stderr.close()
        return 0


def parser() -> argparse.ArgumentParser:
    """The command line of all verbs."""
    root = argparse.ArgumentParser(prog="fxquant", description=(__doc__ or "").split(":")[0])
    root.add_argument("--version", action="version", version=f"fxquant {__version__}")
    verbs = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        sub = verbs.add_parser(
            name,
            help=(verb.__doc__ or "").splitlines()[0],
            description=verb.__doc__,
            epilog=f"example: {verb.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.configure(sub)
        sub.set_defaults(run=verb.run)
    return root
