"""A compiled model stands where the original stood: in calls, loops and diffusers pipelines."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from fxquant import QuantizedModel
from fxquant.calibration import record
from fxquant.runtime.outputs import DenoiserOutput
from tests import models
from tests.runtime import compiled as c
from tests.toy import relative_error

Pair = tuple[nn.Module, QuantizedModel]


@pytest.fixture(scope="module", params=["unconditional", "text_conditional"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """A diffusers model and what it was compiled to."""
    return getattr(c, request.param)()


def test_the_signature_is_the_originals(pair: Pair) -> None:
    model, quantised = pair
    assert inspect.signature(quantised.forward) == inspect.signature(model.forward)
    assert "class_labels" in inspect.signature(quantised.forward).parameters


def test_config_dtype_and_device_are_the_originals(pair: Pair) -> None:
    model, quantised = pair
    assert quantised.config == model.config
    assert quantised.config.sample_size == 8
    assert (quantised.dtype, quantised.device) == (model.dtype, model.device)


def test_the_model_is_in_eval_mode_and_gives_no_gradients(pair: Pair) -> None:
    model, quantised = pair
    assert not any(module.training for module in quantised.modules())
    call = models.calls(model, 1)[0]
    with torch.enable_grad():
        assert not quantised(**call).sample.requires_grad


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (c.unconditional, UNet2DOutput),
        (c.text_conditional, UNet2DConditionOutput),
        (lambda: (None, c.toy()), UNet2DConditionOutput),
        (lambda: (None, c.shared_mite()), DenoiserOutput),
    ],
)
def test_return_dict_chooses_the_output_type(make: Any, kind: type) -> None:
    model, quantised = make()
    call = c.mixed_call(2) if model is None else models.calls(model, 1)[0]
    if kind is DenoiserOutput:
        del call["encoder_hidden_states"]
    names = list(inspect.signature(quantised.forward).parameters)
    padding = [None] * (names.index("return_dict") - len(call))
    outputs = {
        "default": quantised(**call),
        "keyword": quantised(**call, return_dict=True),
        "positional": quantised(*call.values(), *padding, True),
    }
    tuples = {
        "keyword": quantised(**call, return_dict=False),
        "positional": quantised(*call.values(), *padding, False),
    }
    assert {name: type(value) for name, value in outputs.items()} == dict.fromkeys(outputs, kind)
    assert {name: type(value) for name, value in tuples.items()} == dict.fromkeys(tuples, tuple)
    expected = outputs["default"].sample
    assert all(torch.equal(value.sample, expected) for value in outputs.values())
    assert all(torch.equal(value[0], expected) for value in tuples.values())
    assert torch.equal(outputs["default"][0], expected)


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500])])
def test_a_timestep_comes_in_any_form(timestep: Any) -> None:
    model, quantised = c.unconditional()
    x = models.calls(model, 1, batch=3)[0]["sample"]
    each = quantised(x, torch.full((3,), 500)).sample
    assert torch.equal(quantised(x, timestep).sample, each)
    assert not torch.equal(quantised(x, 900).sample, each)


def test_a_model_without_return_dict_returns_what_it_returned() -> None:
    class Bare(c.Mite):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(sample, timestep)[0]

    model = Bare().eval()
    call = c.mite_calls()[0]
    result = c.compile_mite(c.float32(), model)(call["sample"], call["timestep"])
    assert isinstance(result, Tensor)
    assert relative_error(result, model(**call).detach()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = c.mite()
    quantised = c.compile_mite(model=c.mite().to(dtype))
    call = c.mite_calls(n=2, batch=4, seed=3)[1]
    assert quantised.dtype == dtype
    assert quantised(**call).sample.dtype == dtype
    assert relative_error(c.result(quantised, call), c.result(model, call)) < 0.05


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_an_unconditional_pipeline_paints_nearly_the_same_images(
    pipeline: Any, scheduler: Any
) -> None:
    def images(unet: nn.Module, seed: int = 0) -> Tensor:
        pipe = pipeline(unet=unet, scheduler=scheduler()).to("cpu")
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        painted = pipe(batch_size=3, num_inference_steps=6, generator=generator, output_type="np")
        assert pipe.unet is unet
        return torch.from_numpy(painted.images)

    model, quantised = c.unconditional()
    expected = images(model)
    distance = float((images(quantised) - expected).abs().mean())
    another = float((images(model, seed=1) - expected).abs().mean())
    assert 0 < distance < 0.1 * another


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_a_guided_text_to_image_loop_runs_and_ends_near(scheduler: Any) -> None:
    model, quantised = c.text_conditional()
    expected = c.guided(model, scheduler=scheduler)
    distance = relative_error(c.guided(quantised, scheduler=scheduler), expected)
    another = relative_error(c.guided(model, seed=1, scheduler=scheduler), expected)
    assert 0 < distance < 0.25 * another  # random weights: guidance doubles the error every step


def test_every_call_of_a_guided_loop_is_answered_like_the_original() -> None:
    model, quantised = c.text_conditional()
    calls = record(model, lambda: c.guided(model, seed=2))
    assert len(calls) == 5
    assert max(relative_error(c.result(quantised, x), c.result(model, x)) for x in calls) < 0.06


def test_prompts_of_other_lengths_are_served() -> None:
    model, quantised = c.text_conditional()
    call = models.calls(model, 1)[0]
    for tokens in (1, 7, 77):
        prompt = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        call["encoder_hidden_states"] = prompt
        assert relative_error(c.result(quantised, call), c.result(model, call)) < 0.1


def test_a_pipeline_reports_the_compiled_models_dtype_and_device() -> None:
    _, quantised = c.unconditional()
    pipe = DDPMPipeline(unet=quantised, scheduler=DDPMScheduler())
    assert (pipe.dtype, pipe.device) == (torch.float32, torch.device("cpu"))
    assert "QuantizedUNet2DModel" in str(pipe)


@pytest.mark.slow
def test_the_reduced_cifar_ddpm_paints_nearly_the_same_images() -> None:
    model = models.build("ddpm")
    assert isinstance(model, UNet2DModel)
    quantised = c.compiled(model, models.calls(model, 5))
    painted = []
    for unet in (model, quantised):
        pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(batch_size=4, num_inference_steps=5, generator=generator, output_type="np")
        painted.append(torch.from_numpy(images.images))
    assert 0 < float((painted[0] - painted[1]).abs().mean()) < 0.05
