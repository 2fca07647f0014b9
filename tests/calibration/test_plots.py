"""The picture of a selection: what is on it, with and without scores."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from fxquant.calibration.choice import Choice
from fxquant.calibration.plots import plot_selection
from fxquant.errors import EvaluationError

SCORED = Choice(
    "tdac",
    None,
    (900.0, 500.5, 0.0),
    torch.tensor([5, 0, 3]),
    torch.tensor([0.0, 2.0, 1.0]),
    torch.tensor([7.5, 1.0, 3.0]),
)
PLAIN = Choice("uniform", "only 3 samples a timestep", (9.0, 0.0), torch.tensor([1, 1]))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_scores_and_counts_stand_over_their_timesteps(tmp_path, drawn):
    plot_selection(SCORED, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    density, counts, variety = drawn[0].axes
    assert list(density.lines[0].get_ydata()) == [0.0, 2.0, 1.0]
    assert list(variety.lines[0].get_ydata()) == [7.5, 1.0, 3.0]
    assert [bar.get_height() for bar in counts.patches] == [5, 0, 3]
    assert [label.get_text() for label in counts.get_xticklabels()] == ["900", "500.5", "0"]
    assert "8 in all" in counts.get_ylabel()


def test_without_scores_it_says_why(tmp_path, drawn):
    plot_selection(PLAIN, str(tmp_path / "plot.png"))
    above, counts = drawn[0].axes
    assert [text.get_text() for text in above.texts] == ["only 3 samples a timestep"]
    assert "uniform" in above.get_title()
    assert [bar.get_height() for bar in counts.patches] == [1, 1]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'fxquant\[plots\]'"):
        plot_selection(SCORED, tmp_path / "plot.png")
