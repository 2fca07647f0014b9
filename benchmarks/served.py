"""What a system is to the benchmark: how it is prepared, loaded, run; and its inputs as arrays.

No torch here, nor in what this imports: see common.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]  # a call; what lies in a dictionary is called OUTER.INNER
Row = tuple[str, int, float]  # kind of operator, calls in a step, seconds in a step

TIMED = "timed"


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        batch: of a step.
        size: height and width of the sample, the configuration's if None.
        calls: inputs to calibrate with.
        folder: of inputs, outputs and what systems prepare.
        prepared: batch and size of the step that systems are prepared for, if another.
    """

    arch: str
    batch: int
    size: int | None
    calls: int
    threads: int
    folder: str
    prepared: tuple[int, int | None] | None = None

    @property
    def key(self) -> str:
        """Names files of these inputs."""
        return _key(self.arch, self.batch, self.size)

    @property
    def prepared_key(self) -> str:
        """Names files prepared with these."""
        return _key(self.arch, *(self.prepared or (self.batch, self.size)))

    def file(self, name: str) -> Path:
        """A file in the folder."""
        return Path(self.folder) / name

    def calibration(self) -> list[Arrays]:
        """The calls that every quantised system sees."""
        return [self._read(f"calibration{k}") for k in range(self.calls)]

    def timed(self) -> Arrays:
        """The call that is timed and compared; no system was calibrated with it."""
        return self._read(TIMED)

    def _read(self, part: str) -> Arrays:
        with np.load(self.file(f"inputs-{self.key}.npz")) as inputs:
            names = [n for n in inputs.files if n.startswith(f"{part}/")]
            return {n.partition("/")[2]: inputs[n] for n in names}


def _key(arch: str, batch: int, size: int | None) -> str:
    return f"{arch}-{batch}-{size or 'default'}"


@dataclass(frozen=True)
class Served:
    """A system in this process.

    Attributes:
        step: the whole call, from its input to an array.
        profile: time by kind of operator in one step, the longest first.
        seconds: what it took to get here, by stage.
    """

    step: Callable[[], NDArray[Any]]
    profile: Callable[[], list[Row]]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        load: makes it ready in this process, and resets the peak of memory where serving begins:
            after an original that a user would not have in memory is gone.
        prepare: writes what `load` reads, in a process of its own.
        packages: what must be installed.
        opens: the most memory it needs until it serves, over the size of the float32 weights.
    """

    load: Callable[[Settings, Path], Served]
    prepare: Callable[[Settings, Path], None] | None = None
    packages: tuple[str, ...] = ()
    opens: float = 1.0


def write_inputs(settings: Settings) -> int:
    """Draw the calls and keep them as arrays; bytes of the float32 weights."""
    from common import example, outline

    model, weights = outline(settings.arch)
    parts = [f"calibration{k}" for k in range(settings.calls)] + [TIMED]
    calls = {
        part: example(model, settings.batch, settings.size, seed) for seed, part in enumerate(parts)
    }
    arrays: dict[str, Any] = {
        f"{part}/{name}": array for part, call in calls.items() for name, array in _flat(call)
    }
    np.savez(settings.file(f"inputs-{settings.key}.npz"), **arrays)
    return weights


def _flat(call: dict[str, Any], outer: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    for name, value in call.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield outer + name, value.numpy()


def longest(rows: dict[str, tuple[int, float]]) -> list[Row]:
    """Rows of a profile, the longest first."""
    found = [(kind, calls, seconds) for kind, (calls, seconds) in rows.items()]
    return sorted(found, key=lambda row: -row[2])


def added(rows: list[Row]) -> list[Row]:
    """Rows of one kind as one row, the longest first."""
    total: dict[str, tuple[int, float]] = {}
    for kind, calls, seconds in rows:
        before = total.get(kind, (0, 0.0))
        total[kind] = (before[0] + calls, before[1] + seconds)
    return longest(total)
