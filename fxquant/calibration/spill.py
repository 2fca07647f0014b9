"""Tensors by number, in memory up to a byte budget and in a folder beyond it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fxquant.calibration.files import made, read_tensors, write_tensors
from fxquant.errors import SettingError


class Spill:
    """Numbered dicts of tensors.

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
        self._held: dict[int, Mapping[str, Tensor]] = {}
        self._files: dict[int, Path] = {}

    def __setitem__(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        if self._files:
            self._write(number, tensors)
            return
        self._held[number] = tensors
        if sum(_bytes(t) for t in self._held.values()) > self.byte_budget:
            for key, held in self._held.items():
                self._write(key, held)
            self._held = {}

    def __getitem__(self, number: int) -> Mapping[str, Tensor]:
        """What was put there.

        Raises:
            KeyError: nothing was.
            LoaderError: its file is damaged or gone.
        """
        if number in self._held:
            return self._held[number]
        return read_tensors(self._files[number])

    def __len__(self) -> int:
        return len(self._held) + len(self._files)

    @property
    def folder(self) -> Path | None:
        """Where the files are; None while all is in memory."""
        return next(iter(self._files.values())).parent if self._files else None

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        if self._place is None:
            self._place = tempfile.mkdtemp(prefix="fxquant-")
            weakref.finalize(self, shutil.rmtree, self._place, ignore_errors=True)
        self._files[number] = write_tensors(made(self._place), number, tensors)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())
