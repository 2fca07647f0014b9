"""How commands show results: tables for people, one JSON object for scripts."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxquant.errors import SettingError

_WIDTH = 100  # columns where there is no terminal to ask


def show_json(value: Any) -> None:
    """One JSON object on standard output."""
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


def show_table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> None:
    """A titled table on standard output, the first `left` columns left, the others right."""
    result = Table()
    for k, header in enumerate(headers):
        result.add_column(header, justify="right" if k >= left else "left", overflow="fold")
    for row in rows:
        result.add_row(*map(escape, row))
    console = Console(file=sys.stdout)
    console = console if console.is_terminal else Console(file=sys.stdout, width=_WIDTH)
    console.print(title, highlight=False, markup=False)
    console.print(result)


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:.2f} MiB"


def folder_named(text: str) -> Path:
    """The path, for argparse; an empty one would be the working folder, which nobody means."""
    if not text.strip():
        raise ArgumentTypeError("it is empty: name a folder (`.` is this one)")
    return Path(text)


def check_writable(folder: Path) -> Path:
    """The folder, which exists or could be made: asked before the work, not after.

    Raises:
        SettingError: it is a file, or nothing may be written there.
    """
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise SettingError(f"{folder} cannot be written: {there} is a file; name another folder")
    try:
        tempfile.TemporaryFile(dir=there).close()  # permission bits say nothing to root
    except OSError as error:
        raise SettingError(
            f"{folder} cannot be written: {there} takes no file ({error.strerror}); name another "
            "folder"
        ) from error
    return folder
