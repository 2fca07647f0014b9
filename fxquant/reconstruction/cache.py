"""Activations of all samples, in memory up to a budget and in files beyond it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# Of a budget: the rest is for what comes on top of the values themselves. With all of it in values
# reconstructing Stable Diffusion 1.x took 1.19x what the budget grew by.
_SHARE_OF_VALUES = 0.85


class Stored:
    """One value of every sample: rows [N, ...], written and read by row.

    A value whose leading dimension is k times the batch (a model that folds parts of each sample
    together) has k leading entries a row.

    Args:
        is_shared: all samples of a batch have the value together, so each has all of it: it is
            [b, ...] when it is written, and read as the first sample has it.
    """

    def __init__(
        self, rows: int, like: Tensor, batch: int, file: Path | None, is_shared: bool = False
    ):
        self._parts, rest = divmod(like.shape[0], batch)
        assert not rest, f"{tuple(like.shape)} has no whole number of entries a sample"
        self.shape = (self._parts, *like.shape[1:])
        self.dtype = like.dtype
        self._is_shared = is_shared
        self.in_memory = file is None
        self._row_bytes = row_bytes(like, batch)
        self._tensor: Tensor | None = None
        if file is None:
            self._tensor = torch.empty(rows, *self.shape, dtype=self.dtype)
        else:
            self._file = file.open("w+b", buffering=0)
            file.unlink()  # lives as long as it is open, and leaves nothing behind

    def write(self, start: int, value: Tensor) -> None:
        """Rows from `start`: value [b * k, ...]."""
        value = value.detach().to("cpu").contiguous()
        if self._tensor is not None:
            rows = value.shape[0] // self._parts
            self._tensor[start : start + rows] = value.view(rows, *self.shape)
            return
        data = value.flatten().view(torch.uint8).numpy().data
        offset = start * self._row_bytes
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows of these samples as the model has them: [b * k, ...], contiguous.

        Contiguous on purpose: torch 2.13's group-norm backward crashes on channels-last maps of
        some 4x4 residual blocks.
        """
        return self._rows(index[:1])[0] if self._is_shared else self._rows(index)

    def _rows(self, index: Tensor) -> Tensor:
        if self._tensor is not None:
            return self._tensor[index].flatten(0, 1)
        raw = torch.empty(len(index), self._row_bytes, dtype=torch.uint8)
        for row, sample in zip(raw.numpy(), index.tolist(), strict=True):
            view, offset = row.data, sample * self._row_bytes
            while view:
                count = os.preadv(self._file.fileno(), [view], offset)
                assert count, "the file of a stored activation is too short"
                view, offset = view[count:], offset + count
        return raw.view(self.dtype).view(len(index) * self.shape[0], *self.shape[1:])

    def close(self) -> None:
        """Give memory or file back."""
        if self._tensor is None:
            self._file.close()
        self._tensor = None


class Cache:
    """Makes and drops stored values.

    Args:
        budget: bytes of memory that holding values may cost; what does not fit goes to files.
        folder: of these files; a temporary one by default.
    """

    def __init__(self, budget: int, folder: str | Path | None = None):
        self.budget = budget
        self._most = int(_SHARE_OF_VALUES * budget)
        self.used = 0
        self.peak = 0
        self.spilled = 0
        self._held: dict[Stored, int] = {}  # bytes in memory
        self._folder = tempfile.TemporaryDirectory(prefix="fxquant-", dir=folder)

    def new(self, rows: int, like: Tensor, batch: int, is_shared: bool = False) -> Stored:
        """Room for `rows` samples of a value of which `like` is a batch; see `Stored`."""
        size = rows * row_bytes(like, batch)
        fits = self.used + size <= self._most
        file = None if fits else Path(self._folder.name) / f"{self.spilled}"
        stored = Stored(rows, like, batch, file, is_shared)
        self._held[stored] = size if fits else 0
        if fits:
            self.used += size
            self.peak = max(self.peak, self.used)
        else:
            self.spilled += size
        return stored

    def drop(self, stored: Stored) -> None:
        """Forget a value."""
        self.used -= self._held.pop(stored)
        stored.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for stored in list(self._held):
            self.drop(stored)
        self._folder.cleanup()


def row_bytes(value: Tensor, batch: int) -> int:
    """Bytes of a value [b * k, ...] for each of its b samples."""
    return value.numel() * value.element_size() // batch
