"""A small pipeline on disk and its artefact, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from fxquant.cli import main

QUICK = ("--calls", "2", "--batch", "2")


@functools.cache
def small_unet() -> UNet2DModel:
    """An unconditional DDPM of one level, 8x8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ).eval()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with that unet and a scheduler."""
    path = tmp_path_factory.mktemp("pipeline")
    small_unet().save_pretrained(path / "unet")
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
