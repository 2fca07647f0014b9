"""Set-up of every test run."""

from __future__ import annotations

import importlib.util
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch loads OpenMP

import pytest
import torch

THREADS = 2
BARE = ("passes", "kernels")


def pytest_configure() -> None:
    """Refuse to run without the installed package; fix the number of threads.

    Raises:
        pytest.UsageError: fxquant.passes or fxquant.kernels cannot be imported.
    """
    missing = [name for name in BARE if importlib.util.find_spec(f"fxquant.{name}") is None]
    if missing:
        raise pytest.UsageError(
            f"fxquant.{missing[0]} is not importable: its folder lies outside fxquant/, so the "
            "package must be installed. Run pip install -e ."
        )
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _no_second_copy() -> None:
    """A bare import of passes or kernels would load every module, and register every op, twice."""
    second = [name for name in BARE if name in sys.modules]
    assert not second, f"{second[0]} was imported bare; write fxquant.{second[0]}"
