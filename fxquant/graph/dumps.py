"""FXQUANT_DUMP=DIR: a numbered file with the graph after every pass.

    DIR/00_capture.txt
    DIR/01_strip_noops.txt      # 01 strip_noops  -12 nodes  0.03 s

Numbers count from the start of one compile() or load(); the next one overwrites equal names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fxquant.errors import SettingError
from fxquant.graph.dump import dump
from fxquant.graph.runner import Record

VARIABLE = "FXQUANT_DUMP"
CAPTURE = "capture"

OnPass = Callable[[Record], None]


def header(number: int, record: Record, seconds: bool = False) -> str:
    """# 07 insert_observers  +38 nodes  0.12 s (goldens and diffs leave the time out)."""
    time = f"  {record.seconds:.2f} s" if seconds else ""
    return f"# {number:02d} {record.name}  {record.nodes[1] - record.nodes[0]:+d} nodes{time}\n"


class DumpFolder:
    """Writes every record it is called with to the next numbered file of a folder.

    Raises:
        SettingError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self._writing(lambda: folder.mkdir(parents=True, exist_ok=True))

    def __call__(self, record: Record) -> None:
        text = header(self.count, record, seconds=True) + dump(record.graph)
        file = self.folder / f"{self.count:02d}_{record.name}.txt"
        self._writing(lambda: file.write_text(text, encoding="utf-8"))
        self.count += 1

    def _writing(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise SettingError(
                f"{VARIABLE}={self.folder}: no dump can be written there ({error.strerror}); "
                "name a folder you may write to, or unset the variable"
            ) from error


def dumping(on_pass: OnPass | None = None) -> OnPass | None:
    """`on_pass`, and before it a dump if FXQUANT_DUMP names a folder."""
    place = os.environ.get(VARIABLE)
    if not place:
        return on_pass
    write = DumpFolder(Path(place))

    def both(record: Record) -> None:
        write(record)
        if on_pass:
            on_pass(record)

    return both
