"""The DDIM loop against diffusers' pipeline, and its promise about seeds and batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from fxquant.calibration import record
from fxquant.calibration.sampling import denoise, sample_ddim
from tests import models


@pytest.fixture(scope="module")
def ddpm() -> nn.Module:
    return models.build("ddpm")


@pytest.fixture(scope="module")
def conditional() -> nn.Module:
    config = {**models.config("ddpm"), "num_class_embeds": 10}
    torch.manual_seed(0)
    model: nn.Module = UNet2DModel.from_config(config)
    return model.eval()


def test_it_equals_the_pipeline_of_diffusers(ddpm: nn.Module) -> None:
    pipe = DDIMPipeline(unet=ddpm, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = pipe(
        batch_size=2, num_inference_steps=3, generator=generator, output_type="pt"
    ).images
    images = sample_ddim(ddpm, DDIMScheduler(), count=2, steps=3, seed=3)
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected)


def test_the_batch_size_does_not_change_the_images(conditional: nn.Module) -> None:
    labels = torch.arange(5)
    whole, parts = (
        sample_ddim(conditional, DDIMScheduler(), class_labels=labels, steps=2, batch_size=b)
        for b in (5, 2)
    )
    assert whole.shape == (5, 3, 16, 16)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_labels_and_seeds_matter(conditional: nn.Module) -> None:
    def sample(label: int, seed: int) -> Tensor:
        labels = torch.tensor([label])
        return sample_ddim(conditional, DDIMScheduler(), class_labels=labels, steps=2, seed=seed)

    assert torch.equal(sample(1, 0), sample(1, 0))
    assert not torch.equal(sample(1, 0), sample(2, 0))
    assert not torch.equal(sample(1, 0), sample(1, 1))


def test_a_generator_replaces_the_seed(ddpm: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    given = sample_ddim(ddpm, DDIMScheduler(), count=1, steps=1, generator=generator)
    assert torch.equal(given, sample_ddim(ddpm, DDIMScheduler(), count=1, steps=1, seed=7))


def test_the_scheduler_given_is_left_alone(ddpm: nn.Module) -> None:
    scheduler = DDIMScheduler()
    sample_ddim(ddpm, scheduler, count=1, steps=2)
    assert scheduler.num_inference_steps is None


def test_anything_with_the_signature_will_do_and_can_be_recorded() -> None:
    class Zero(nn.Module):
        config = SimpleNamespace(in_channels=2, sample_size=(4, 6))

        def forward(
            self,
            sample: Tensor,
            timestep: Tensor,
            class_labels: Any = None,
            return_dict: bool = True,
        ) -> tuple[Tensor]:
            return (torch.zeros_like(sample),)

    model = Zero()
    images: list[Tensor] = []
    calls = record(
        model,
        lambda: images.append(sample_ddim(model, DDIMScheduler(), count=3, batch_size=2, steps=2)),
    )
    assert images[0].shape == (3, 2, 4, 6)
    assert [len(call["sample"]) for call in calls] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "say how many images"),
        ({"count": 0}, "say how many images"),
        ({"class_labels": torch.zeros(2, 1)}, r"must be \[N\].*\[2, 1\]"),
        ({"class_labels": torch.zeros(2), "count": 3}, "count=3"),
        ({"count": 1, "steps": 0}, "1 or more, got 0 and 64"),
        ({"count": 1, "batch_size": 0}, "1 or more, got 50 and 0"),
    ],
    ids=["neither", "zero", "matrix labels", "labels against count", "no steps", "no batch"],
)
def test_impossible_requests_are_refused(
    ddpm: nn.Module, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_ddim(ddpm, DDIMScheduler(), **wrong)


class Knows(nn.Module):
    """Predicts the very noise that separates its input from one known image, or from two."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.image = image
        self.signal = DDIMScheduler().alphas_cumprod.sqrt()
        self.noise = (1 - DDIMScheduler().alphas_cumprod).sqrt()
        self.batches: list[int] = []

    def forward(
        self, sample: Tensor, timestep: Tensor, shift: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        t = int(timestep)
        self.batches.append(len(sample))
        image = self.image + shift[:, None, None, None]
        return ((sample - self.signal[t] * image) / self.noise[t],)


SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "pndm": PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True),
    "dpm": DPMSolverMultistepScheduler(timestep_spacing="leading"),
    "euler": EulerDiscreteScheduler(timestep_spacing="leading"),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_every_scheduler_leads_a_perfect_denoiser_to_the_image(
    scheduler: str, guided: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)
    model = Knows(image)
    images = denoise(
        model,
        SCHEDULERS[scheduler],
        noise.expand(2, -1, -1, -1),
        steps=8,
        conditions={"shift": torch.tensor([0.0, 0.5])},
        unconditional={"shift": torch.tensor([1.0, 1.0])} if guided else None,
        guidance_scale=3.0,
    )
    # the prediction is affine in the shift, so guidance moves it along: 1 + 3 (shift - 1)
    expected = torch.cat([image + (s if not guided else 3 * s - 2) for s in (0.0, 0.5)])
    assert images.shape == (2, 3, 4, 4)
    torch.testing.assert_close(images, expected, rtol=0.02, atol=0.03)
    assert set(model.batches) == {4 if guided else 2}


def test_guidance_goes_from_unconditional_to_conditional(conditional: nn.Module) -> None:
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, two = ({"class_labels": torch.full((2,), c)} for c in (1, 2))

    def sample(**options: Any) -> Tensor:
        return denoise(conditional, DDIMScheduler(), noise, steps=2, **options)

    def guided(scale: float) -> Tensor:
        return sample(conditions=one, unconditional=two, guidance_scale=scale)

    torch.testing.assert_close(guided(1.0), sample(conditions=one), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided(0.0), sample(conditions=two), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided(1.0), guided(4.0), rtol=1e-2, atol=1e-2)


def test_a_stochastic_scheduler_draws_from_the_generator(ddpm: nn.Module) -> None:
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return denoise(ddpm, DDPMScheduler(), noise, steps=2, generator=generator)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_guidance_needs_the_same_arguments_twice(ddpm: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"unconditional has \[\], conditions has \['shift'\]"):
        denoise(
            ddpm,
            DDIMScheduler(),
            torch.ones(1, 3, 16, 16),
            steps=1,
            conditions={"shift": torch.ones(1)},
            unconditional={},
        )
