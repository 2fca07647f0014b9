"""The pictures are written, show the data, and say what is missing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fxquant.errors import EvaluationError
from fxquant.evaluate import plots
from fxquant.evaluate.bisect import UnitError

NAMES = ["down.0", "mid"]


def errors(size: float) -> dict[float, list[UnitError]]:
    return {t: [UnitError(n, "Conv2d", 2 * size, size * t) for n in NAMES] for t in (0.0, 500.0)}


def ranges(size: float) -> dict[float, torch.Tensor]:
    return {t: torch.tensor([[-1.0, size], [0.0, 1 + t]]) for t in (0.0, 500.0)}


@pytest.fixture
def matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("matplotlib")
def test_plots_are_pictures_of_the_data(tmp_path):
    drawn = {}
    for size in (0.1, 5.0):
        plots.plot_unit_errors(errors(size), tmp_path / f"errors{size}.png")
        plots.plot_activation_ranges(ranges(size), NAMES, tmp_path / f"ranges{size}.png")
    for file in tmp_path.iterdir():
        drawn[file.name] = file.read_bytes()
        assert drawn[file.name].startswith(b"\x89PNG")
    assert len(set(drawn.values())) == 4


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(EvaluationError, match=r"pip install 'fxquant\[plots\]'"):
        plots.plot_unit_errors(errors(1.0), tmp_path / "errors.png")
    assert not list(tmp_path.iterdir())
