"""Calls by number, in memory up to a byte budget and in a folder beyond it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from fxquant.calibration.files import made, read_call, write_call
from fxquant.errors import SettingError
from fxquant.graph.structure import FlatCall


class Spill:
    """Numbered calls.

    Once they would hold more bytes than the budget, all of them, the earlier ones too, are
    safetensors files in a folder, as `save_calls` writes them; what is read is mapped.
    """

    def __init__(self, byte_budget: int, folder: str | Path | None = None):
        """Nothing is written before the budget is used up.

        Args:
            folder: None takes a temporary one that goes with this object.

        Raises:
            SettingError: the folder holds safetensors files already, or the budget is negative.
        """
        if byte_budget < 0:
            raise SettingError(f"byte_budget={byte_budget}; give a number of bytes from 0 upwards")
        if folder is not None and any(Path(folder).glob("*.safetensors")):
            raise SettingError(f"{folder} already holds calls; give a folder without any")
        self.byte_budget = byte_budget
        self._place = folder
        self._held: dict[int, FlatCall] = {}
        self._files: dict[int, Path] = {}

    def __setitem__(self, number: int, call: FlatCall) -> None:
        if self._files:
            self._write(number, call)
            return
        self._held[number] = call
        if sum(_bytes(t) for t in self._held.values()) > self.byte_budget:
            for key, held in self._held.items():
                self._write(key, held)
            self._held = {}

    def __getitem__(self, number: int) -> FlatCall:
        """What was put there.

        Raises:
            KeyError: nothing was.
            LoaderError: its file is damaged or gone.
        """
        if number in self._held:
            return self._held[number]
        return read_call(self._files[number])

    def __len__(self) -> int:
        return len(self._held) + len(self._files)

    @property
    def folder(self) -> Path | None:
        """Where the files are; None while all is in memory."""
        return next(iter(self._files.values())).parent if self._files else None

    def _write(self, number: int, call: FlatCall) -> None:
        if self._place is None:
            self._place = tempfile.mkdtemp(prefix="fxquant-")
            weakref.finalize(self, shutil.rmtree, self._place, ignore_errors=True)
        self._files[number] = write_call(made(self._place), number, call)


def _bytes(call: FlatCall) -> int:
    return sum(t.nbytes for t in call.tensors.values())
