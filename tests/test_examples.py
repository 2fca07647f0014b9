"""The examples run and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart():
    assert load("quickstart").main() > 38


def test_own_loader():
    images = load("own_loader").main()
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


def test_write_a_pass():
    changes = load("write_a_pass").main()
    assert "-  %neg_1: f32[Bx4] = neg(%neg)" in changes
    assert "+  %exp: f32[Bx4] = exp(%sample)" in changes


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
    argv = ["demo.py", "--images", "200", "--steps", "10", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    load("demo").main()
    assert (tmp_path / "demo.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    for row in ("weights", "ms / step", "PSNR to FP32", "FD ratio", "FD to the real", "recognised"):
        assert row in printed
