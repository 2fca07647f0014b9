"""A small pipeline on disk and its artefact, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import DDIMScheduler

from fxquant.cli import main
from tests.runtime.compiled import unconditional

QUICK = ("--calls", "2", "--batch", "2")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the unet and the scheduler of an unconditional DDPM, 8x8 pixels."""
    path = tmp_path_factory.mktemp("pipeline")
    unconditional()[0].save_pretrained(path / "unet")
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(path / "scheduler")
    return str(path)


@pytest.fixture(scope="session")
def artefact(pipeline: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `fxquant quantize` makes of it."""
    path = str(tmp_path_factory.mktemp("artefact") / "w8a8")
    assert main(["quantize", pipeline, "--out", path, *QUICK]) == 0
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message of a command line that ends with status 2 and prints nothing else."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run
