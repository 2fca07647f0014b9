"""What record takes from pipelines and loops, checked against what the model was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from fxquant.calibration import record
from tests import models


class Echo(nn.Module):
    """Remembers nothing; its forward has every kind of argument that denoisers have."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        condition: Any = None,
        return_dict: bool = True,
        **extra: Any,
    ) -> tuple[Tensor]:
        return (sample,)


@pytest.fixture(scope="module")
def ddpm() -> nn.Module:
    return models.build("ddpm")


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)]
)
def test_a_pipeline_gives_a_call_a_step(ddpm: nn.Module, pipeline: Any, scheduler: Any) -> None:
    pipe = pipeline(unet=ddpm, scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    calls = record(
        ddpm,
        lambda: pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="pt"),
    )
    assert [set(call) for call in calls] == [{"sample", "timestep"}] * 4
    assert [int(call["timestep"]) for call in calls] == pipe.scheduler.timesteps.tolist()
    first_noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(calls[0]["sample"], first_noise)


def test_recorded_calls_replay() -> None:
    sdxl = models.build("sdxl")
    given = models.calls(sdxl, n=2)
    calls = record(sdxl, lambda: [sdxl(**call) for call in given])
    with torch.no_grad():
        for call, original in zip(calls, given, strict=True):
            assert torch.equal(sdxl(**call).sample, sdxl(**original).sample)
    assert set(calls[0]["added_cond_kwargs"]) == {"text_embeds", "time_ids"}


def test_arguments_are_named_however_they_were_given() -> None:
    echo, x = Echo(), torch.ones(1, 2)
    calls = record(echo, lambda: (echo(x, 3, None, False), echo(timestep=0.5, sample=x, scale=x)))
    assert [list(call) for call in calls] == [
        ["sample", "timestep", "condition"],
        ["sample", "timestep", "scale"],
    ]
    assert [call["timestep"].dtype for call in calls] == [torch.int64, torch.float32]
    assert [call["timestep"].ndim for call in calls] == [0, 0]


def test_copies_are_detached_and_later_writes_do_not_reach_them() -> None:
    echo, x = Echo(), torch.ones(1, 2, requires_grad=True)
    condition = {"kept": x, "dropped": None, "nested": [x]}
    (call,) = record(echo, lambda: echo(x, torch.tensor(1), condition))
    with torch.no_grad():
        x.zero_()
    for copy in (call["sample"], call["condition"]["kept"], call["condition"]["nested"][0]):
        assert torch.equal(copy, torch.ones(1, 2))
        assert not copy.requires_grad
    assert call["condition"]["dropped"] is None
    assert isinstance(call["condition"]["nested"], list)


def test_calls_recorded_in_inference_mode_can_be_trained_on() -> None:
    echo = Echo()
    with torch.inference_mode():
        (call,) = record(echo, lambda: echo(torch.ones(2), 1))
    assert not call["sample"].is_inference()


def test_every_keeps_the_first_of_each_group() -> None:
    echo, x = Echo(), torch.ones(1)
    calls = record(echo, lambda: [echo(x, t) for t in range(7)], every=3)
    assert [int(call["timestep"]) for call in calls] == [0, 3, 6]


def test_a_run_without_calls_is_refused() -> None:
    echo = Echo()
    with pytest.raises(ValueError, match=r"never called this Echo.*pipe\.unet"):
        record(echo, lambda: Echo()(torch.ones(1), 0))


def test_every_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        record(Echo(), lambda: None, every=0)


def test_the_hook_goes_even_when_run_fails() -> None:
    echo = Echo()

    def fail() -> None:
        echo(torch.ones(1), 0)
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        record(echo, fail)
    assert not echo._forward_pre_hooks
