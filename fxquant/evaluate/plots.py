"""Pictures of errors and activation ranges over units and timesteps (matplotlib, optional)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxquant.errors import EvaluationError
from fxquant.evaluate.bisect import UnitError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PER_ENTRY, _LEAST = 0.22, 6.0  # inches of width
_FONT = 6


def check_matplotlib() -> None:
    """Raise EvaluationError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError(
            "plots need matplotlib, which is not installed: pip install 'fxquant[plots]'"
        )


def plot_unit_errors(errors: Mapping[float, Sequence[UnitError]], path: Path) -> None:
    """A PNG: mean error of each unit above, isolated error by timestep and unit below.

    Args:
        errors: by timestep, every list with the same units in the same order.

    Raises:
        EvaluationError: matplotlib is missing.
    """
    steps = sorted(errors)
    names = [u.path for u in errors[steps[0]]]
    isolated = torch.tensor([[u.isolated for u in errors[t]] for t in steps])
    cumulative = torch.tensor([[u.cumulative for u in errors[t]] for t in steps])
    figure, (above, below) = _figure(len(names))
    above.plot(cumulative.mean(0), label="cumulative")
    above.plot(isolated.mean(0), label="isolated")
    above.set_ylabel("relative L2, mean")
    above.legend(fontsize=_FONT)
    _heat(figure, below, isolated, steps, "isolated")
    _finish(figure, below, names, path)


def plot_activation_ranges(
    ranges: Mapping[float, Tensor], names: Sequence[str], path: Path
) -> None:
    """A PNG: each quantiser's float range above, its largest magnitude by timestep below.

    Args:
        ranges: [n, 2] lowest and highest by timestep.
        names: of the n quantisers.

    Raises:
        EvaluationError: matplotlib is missing.
    """
    steps = sorted(ranges)
    stacked = torch.stack([ranges[t] for t in steps])  # [T, n, 2]
    low, high = stacked[..., 0].amin(0), stacked[..., 1].amax(0)
    figure, (above, below) = _figure(len(names))
    above.bar(range(len(names)), high - low, bottom=low)
    above.set_yscale("symlog")
    above.set_ylabel("range, all timesteps")
    magnitude = stacked.abs().amax(-1)
    relative = magnitude / magnitude.amax(0).clamp(min=1e-30)
    _heat(figure, below, relative, steps, "max |x| / its largest")
    _finish(figure, below, names, path)


def _figure(entries: int) -> tuple[Figure, Sequence[Axes]]:
    check_matplotlib()
    from matplotlib.figure import Figure

    width = max(_LEAST, _PER_ENTRY * entries)
    figure = Figure(figsize=(width, 6), layout="constrained")
    axes: Any = figure.subplots(2, 1, sharex=True)
    return figure, axes


def _heat(figure: Figure, axes: Axes, values: Tensor, steps: Sequence[float], label: str) -> None:
    """values [timesteps, entries]."""
    image = axes.imshow(values.numpy(), aspect="auto", origin="lower", interpolation="nearest")
    axes.set_yticks(range(len(steps)), [f"{t:g}" for t in steps], fontsize=_FONT)
    axes.set_ylabel("timestep")
    figure.colorbar(image, ax=axes, label=label)


def _finish(figure: Figure, axes: Axes, names: Sequence[str], path: Path) -> None:
    axes.set_xticks(range(len(names)), list(names), rotation=90, fontsize=_FONT)
    figure.savefig(path, dpi=120)
