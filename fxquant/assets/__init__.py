"""The small trained models that the demo and the tests run on. Each folder has a MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

NAMES = ("digits",)


def path(name: str) -> Path:
    """The folder of a bundled model, in diffusers' layout; ValueError when there is none."""
    if name not in NAMES:
        raise ValueError(f"no bundled model is called {name!r}; known names: {', '.join(NAMES)}")
    return Path(__file__).parent / name


def load_digits_unet() -> UNet2DModel:
    """The class-conditional 16x16 digits UNet, float32 (stored as float16), in eval mode."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    unet: UNet2DModel = UNet2DModel.from_pretrained(
        path("digits") / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    unet.eval()
    return unet


def load_digits_scheduler() -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule that the digits UNet was trained on."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler: DDIMScheduler = DDIMScheduler.from_pretrained(path("digits") / "scheduler")
    return scheduler
