"""Small models and what compile made of them, each made once: compiling is what costs time here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import fxquant
from fxquant import QuantizedModel, Recipe
from fxquant.calibration import record
from fxquant.kernels import jit
from fxquant.kernels.machine import detect
from tests import models
from tests.toy import relative_error

Call = dict[str, Any]

FULL_SPEED = detect().arch == "x86_64" and jit.find_compiler() is not None


def float32(name: str = "w8a8-fast", **changes: Any) -> Recipe:
    """A recipe whose float parts compute in float32 on any machine, so that results compare."""
    return Recipe.parse(name).with_(compute_dtype="float32", **changes)


class Mite(nn.Module):
    """A residual convolution and a time embedding, two layers to quantise: compiles in 0.3 s."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.time = nn.Linear(10, 16)  # of so many numbers it is quantised
        self.norm = nn.GroupNorm(2, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> tuple[Tensor]:
        """[B, 4, H, W] and one timestep or [B]; the hidden range grows with the timestep."""
        t = torch.as_tensor(timestep).reshape(-1, 1).expand(sample.shape[0], 1) / 100
        embedding = self.time(torch.cat([t, t.square() / 10] * 5, dim=1).to(sample.dtype))
        hidden = self.conv_in(sample) + embedding[:, :, None, None]
        hidden = hidden + self.conv(F.silu(self.norm(hidden)))
        return (self.conv_out(hidden),)


def mite(seed: int = 0) -> Mite:
    """A new one in eval mode."""
    return _seeded(Mite, seed)


def mite_calls(n: int = 4, batch: int = 2, seed: int = 0) -> list[Call]:
    """Timesteps are spread evenly over 0..999."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"sample": torch.randn(batch, 4, 8, 8, generator=generator), "timestep": t.round()}
        for t in torch.linspace(0, 999, n)
    ]


def compile_mite(
    recipe: str | Recipe = "w8a8-fast", model: nn.Module | None = None, **options: Any
) -> QuantizedModel:
    """A new compilation."""
    return compiled(model or mite(), mite_calls(), recipe, **options)


def compiled(
    model: nn.Module, loader: Any, recipe: str | Recipe = "w8a8-fast", **options: Any
) -> QuantizedModel:
    """Without the progress bar."""
    return fxquant.compile(model, loader, recipe, progress=False, **options)


@functools.cache
def shared_mite() -> QuantizedModel:
    return compile_mite(float32())


@functools.cache
def float_toy() -> nn.Module:
    return models.build("toy")


@functools.cache
def toy(name: str = "w8a8-fast", backend: str = "auto") -> QuantizedModel:
    """The toy of tests.models, with float32 computation."""
    return compiled(float_toy(), models.calls("toy", 5, batch=16), float32(name), backend=backend)


@functools.cache
def unconditional() -> tuple[UNet2DModel, QuantizedModel]:
    """A DDPM without labels, 8x8 pixels: the original and the compiled one."""

    def build() -> UNet2DModel:
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    model = _seeded(build)
    return model, compiled(model, models.calls(model, 5), float32())


@functools.cache
def text_conditional() -> tuple[UNet2DConditionModel, QuantizedModel]:
    """A Stable Diffusion of one level, 8x8 latents: the original and the compiled one."""

    def build() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        )

    model = _seeded(build)
    recorded = record(model, lambda: guided(model, steps=10, seed=9))
    return model, compiled(model, recorded + models.calls(model, 5), float32())


def guided(
    unet: nn.Module, steps: int = 5, seed: int = 0, scheduler: type[Any] = DDIMScheduler
) -> Tensor:
    """Latents of the loop in StableDiffusionPipeline, with the arguments that it passes."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    prompts = torch.randn(2 * len(latents), 7, 16, generator=generator)
    schedule = scheduler()
    schedule.set_timesteps(steps)
    for t in schedule.timesteps:  # 0-d
        doubled = schedule.scale_model_input(torch.cat([latents] * 2), t)
        with torch.no_grad():
            noise = unet(
                doubled,
                t,
                encoder_hidden_states=prompts,
                timestep_cond=None,
                cross_attention_kwargs=None,
                added_cond_kwargs=None,
                return_dict=False,
            )[0]
        plain, prompted = noise.chunk(2)
        latents = schedule.step(plain + 2.0 * (prompted - plain), t, latents).prev_sample
    return latents


def _seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


@contextmanager
def own_kernels() -> Iterator[None]:
    """Within, these models run fxquant's own kernels, whose steps are replayed: also where a CPU
    has AMX, with which `auto` picks oneDNN."""
    if "amx_int8" not in detect().cpu_features:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXQUANT_CPU", "vnni")
        _forget()
        yield
    _forget()


def _forget() -> None:
    for cached in (detect, toy, shared_mite, unconditional, text_conditional):
        cached.cache_clear()


def mixed_call(batch: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> Call:
    """One call of the toy in which every sample has a timestep and a prompt of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=generator),
    }


def part(call: Call, start: int, stop: int) -> Call:
    """Some of the samples of a call."""
    return {name: tensor[start:stop] for name, tensor in call.items()}


@torch.no_grad()
def result(model: nn.Module, call: Call) -> Tensor:
    """The first output."""
    return model(**call, return_dict=False)[0]


def errors(a: Tensor, b: Tensor) -> list[float]:
    """Relative error of every sample."""
    return [relative_error(x, y) for x, y in zip(a, b, strict=True)]


def fresh(model: QuantizedModel) -> QuantizedModel:
    """A copy that has packed no weights yet."""
    return copy.deepcopy(model)
