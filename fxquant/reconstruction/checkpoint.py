"""What a reconstruction has finished, unit by unit, so that an interrupted one goes on.

A folder with run.json, which names the run by a fingerprint of everything that decides its result,
and a file for each trained unit. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant import __version__
from fxquant.errors import CheckpointError

_RUN = "run.json"
_REPORT, _TABLE, _TENSOR = "report", "table", "tensor."


@dataclass(frozen=True)
class UnitReport:
    """What training did to one unit.

    Attributes:
        path, kind: module path and class name.
        loss_before, loss_after: block loss on the inputs that serving sees, with weights rounded
            to nearest and calibrated steps, and as trained.
        settled: fraction of roundings that ended within 0.01 of 0 or 1 by themselves.
        iters: optimiser steps.
        seconds: that these took.
    """

    path: str
    kind: str
    loss_before: float
    loss_after: float
    settled: float
    iters: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path} {self.kind}: loss {self.loss_before:.4g} -> {self.loss_after:.4g}, "
            f"{100 * self.settled:.1f} % settled, {self.iters} iterations, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Trained:
    """A finished unit: its tensors by name, the whole activation table, the report."""

    tensors: dict[str, Tensor]
    table: Tensor
    report: UnitReport


class Checkpoints:
    """The finished units of one run.

    Args:
        folder: made if need be; goes on with what is there.
        run: what decides the result, as plain data.

    Raises:
        CheckpointError: the folder belongs to another run or cannot be used.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _match(self.folder / _RUN, run)
        except OSError as error:
            raise CheckpointError(f"{folder}: no checkpoint can be kept there ({error})") from error

    def read(self, number: int, path: str) -> Trained | None:
        """The unit of this number and module path, if it was finished.

        Raises:
            CheckpointError: a damaged file.
        """
        file = self._file(number)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                report = UnitReport(**json.loads(opened.metadata()[_REPORT]))
                table = opened.get_tensor(_TABLE)
                names = [n for n in opened.keys() if n != _TABLE]  # noqa: SIM118 - no mapping
                tensors = {n.removeprefix(_TENSOR): opened.get_tensor(n) for n in names}
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}); delete it to train its unit again"
            ) from error
        if report.path != path:
            raise CheckpointError(
                f"{file} holds unit {report.path}, not {path}; use another folder"
            )
        return Trained(tensors, table, report)

    def write(self, number: int, trained: Trained) -> None:
        """Keep a finished unit.

        Raises:
            CheckpointError: it cannot be written, for example because the disk is full.
        """
        tensors = {_TENSOR + n: t.cpu().contiguous() for n, t in trained.tensors.items()}
        tensors[_TABLE] = trained.table.cpu().contiguous()
        report = {_REPORT: json.dumps(asdict(trained.report))}
        try:
            _whole(self._file(number), lambda path: save_file(tensors, path, report))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._file(number)} cannot be written: {error}") from error

    def _file(self, number: int) -> Path:
        return self.folder / f"unit_{number:04d}.safetensors"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A digest of shapes, dtypes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def surroundings() -> dict[str, Any]:
    """What besides the inputs decides the last bit of a result."""
    return {"fxquant": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _match(file: Path, run: dict[str, Any]) -> None:
    """Write run.json, or compare with the one that is there."""
    if not file.exists():
        text = json.dumps(run, indent=1, sort_keys=True)
        _whole(file, lambda path: path.write_text(text, encoding="utf-8"))
        return
    try:
        other = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(other, dict):
            raise TypeError(f"a {type(other).__name__}")
        differing = [k for k in sorted({*run, *other}) if run.get(k) != other.get(k)]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); use another folder") from error
    if differing:
        raise CheckpointError(
            f"{file.parent} holds the checkpoints of another run: {', '.join(differing)} "
            "differ. Resume with what it was started with, or name another folder"
        )


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, make it last, put it in place."""
    beside = file.with_name(file.name + ".part")
    write(beside)
    with beside.open("rb") as opened:
        os.fsync(opened.fileno())
    beside.replace(file)
