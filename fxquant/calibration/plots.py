"""A picture of which timesteps the calibration samples come from (matplotlib, optional)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxquant.calibration.choice import Choice
from fxquant.evaluate.plots import check_matplotlib

_SIZE = (8.0, 6.0)  # inches
_FONT = 8


def plot_selection(selection: Choice, path: str | Path) -> None:
    """A PNG over timesteps, noisiest left: TDAC's two scores above, the counts below.

    Args:
        selection: what `select` returned, or `SelectedCalls.selection`. Without scores the upper
            half says why.

    Raises:
        EvaluationError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(selection.timesteps))
    _plot_scores(above, selection)
    below.bar(places, selection.counts.tolist())
    below.set_ylabel(f"samples, {int(selection.counts.sum())} in all")
    below.set_xlabel("timestep")
    names = [f"{t:g}" for t in selection.timesteps]
    below.set_xticks(places, names, rotation=90, fontsize=_FONT)
    figure.savefig(path, dpi=120)


def _plot_scores(axes: Any, selection: Choice) -> None:
    axes.set_title(f"sampler: {selection.sampler}", fontsize=_FONT)
    if selection.density is None or selection.variety is None:
        axes.text(0.5, 0.5, selection.reason or "no scores", transform=axes.transAxes, ha="center")
        return
    lines = axes.plot(selection.density.tolist(), label="density: steps alike")
    axes.set_ylabel("density")
    other = axes.twinx()
    lines += other.plot(selection.variety.tolist(), color="C1", label="variety: 1 - cosine")
    other.set_ylabel("variety")
    axes.legend(handles=lines, fontsize=_FONT)
