"""Which calls a command makes for which model, and the scheduler they are sampled with."""

from __future__ import annotations

import argparse
import logging

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DModel
from torch import nn

from fxquant import assets
from fxquant.calibration import save_calls
from fxquant.cli.inputs import add_call_arguments, calls_for, is_sampled
from fxquant.cli.model import load_scheduler
from fxquant.errors import LoaderError, ModelError
from tests import models
from tests.cli.conftest import small_unet


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_call_arguments(parser)
    return parser.parse_args(["--calls", "3", "--batch", "4", *arguments])


def test_an_image_model_is_sampled_over_the_whole_trajectory(pipeline):
    model = small_unet()
    calls = calls_for(model, pipeline, options())
    assert [set(c) for c in calls] == [{"sample", "timestep"}] * 3
    assert [tuple(c["sample"].shape) for c in calls] == [(4, 3, 8, 8)] * 3
    steps = [int(c["timestep"]) for c in calls]
    assert steps == sorted(set(steps), reverse=True)
    assert steps[0] >= 600


def test_seeds_make_other_noise(pipeline):
    model = small_unet()
    first, again, seeded, other = (
        calls_for(model, pipeline, options("--seed", user), seed=extra)[0]["sample"]
        for user, extra in (("0", 0), ("0", 0), ("1000", 0), ("0", 1000))
    )
    assert torch.equal(first, again)
    assert torch.equal(seeded, other)
    assert not torch.equal(first, other)


def test_classes_take_turns():
    calls = calls_for(assets.load_digits_unet(), "digits", options("--batch", "12"))
    assert calls[0]["class_labels"].tolist() == [*range(10), 0, 1]


def test_a_model_that_reads_prompts_gets_random_calls_and_a_warning(caplog):
    model = models.build("sd")
    with caplog.at_level(logging.WARNING, "fxquant"):
        calls = calls_for(model, "sd", options())
    assert "UNet2DConditionModel reads more than an image" in caplog.text
    assert "--calib DIR" in caplog.text
    assert len(calls) == 3
    assert not torch.equal(calls[0]["sample"], calls[1]["sample"])
    assert calls[0]["encoder_hidden_states"].shape[0] == 4


def test_recorded_calls_win(tmp_path, caplog):
    given = models.calls("sd", 2)
    save_calls(given, tmp_path)
    with caplog.at_level(logging.WARNING, "fxquant"):
        calls = calls_for(models.build("sd"), "sd", options("--calib", str(tmp_path)))
    assert not caplog.records
    assert len(calls) == 2
    assert torch.equal(calls[1]["sample"], given[1]["sample"])


def test_an_empty_folder_of_calls_is_refused(tmp_path):
    with pytest.raises(LoaderError, match=r"holds no \.safetensors file"):
        calls_for(models.build("sd"), "sd", options("--calib", str(tmp_path)))


def test_a_model_without_a_config_needs_recorded_calls():
    with pytest.raises(ModelError, match=r"a Linear: .*save_calls, and pass --calib DIR"):
        calls_for(nn.Linear(1, 1), "linear", options())


def test_what_is_sampled():
    assert is_sampled(small_unet())
    assert not is_sampled(models.build("sd"))
    assert not is_sampled(nn.Linear(1, 1))
    config = small_unet().config
    for name, value in (("class_embed_type", "identity"), ("sample_size", None)):
        odd = UNet2DModel.from_config(config, **{name: value})
        assert not is_sampled(odd), name


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_counts_are_positive(value, capsys):
    with pytest.raises(SystemExit):
        options("--calls", value)
    assert f"{value!r} is not a whole number of 1 or more" in capsys.readouterr().err


def test_the_scheduler_is_that_of_the_pipeline(pipeline, tmp_path):
    for name in (pipeline, f"{pipeline}/unet"):
        assert load_scheduler(name).config.beta_schedule == "scaled_linear"
    assert load_scheduler("digits").config == assets.load_digits_scheduler().config
    PNDMScheduler(beta_end=0.012).save_pretrained(tmp_path / "scheduler")
    other = load_scheduler(str(tmp_path))
    assert isinstance(other, DDIMScheduler)
    assert other.config.beta_end == 0.012


def test_a_lone_unet_gets_the_first_ddpm_schedule_and_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fxquant"):
        assert load_scheduler(str(tmp_path)).config.beta_schedule == "linear"
    assert f"{tmp_path} has no scheduler folder" in caplog.text
