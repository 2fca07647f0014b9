"""Calibrate with your own loader, serve in a stock diffusers pipeline.

    python examples/own_loader.py

A loader is any iterable of UNet calls: dicts of forward's arguments, or tuples of its positional
ones. Here a torch DataLoader over noisy images, then a generator, then samples that were chosen
while a pipeline ran. The model is a small UNet2DModel with random weights, saved and loaded as a
diffusers folder, which is where you would put your own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fxquant
from fxquant.calibration import SelectedCalls, record_selected


class NoisyImages(Dataset[dict[str, Tensor]]):
    """Stand-in for your data: each item is one noisy image [3, 16, 16] and its timestep []."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(3, 16, 16, generator=generator)
        return {"sample": noise, "timestep": torch.randint(0, 1000, (), generator=generator)}


def calls(count: int) -> Iterator[tuple[Tensor, int]]:
    """The same as a generator of positional arguments."""
    for k in range(count):
        yield torch.randn(4, 3, 16, 16), 1000 * k // count


def chosen(unet: UNet2DModel, count: int) -> SelectedCalls:
    """Samples of `count` trajectories, at the timesteps that TDAC finds worth it."""

    def run() -> None:
        pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        pipeline(batch_size=8, num_inference_steps=10, output_type="np")

    calls = record_selected(unet, [run] * (count // 8), count=count)
    taken = zip(calls.selection.timesteps, calls.selection.counts.tolist(), strict=True)
    print("samples by timestep:", ", ".join(f"{t:g}: {n}" for t, n in taken))
    return calls


def load_model() -> UNet2DModel:
    """A random-weight UNet, through save_pretrained and from_pretrained."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: UNet2DModel = UNet2DModel.from_pretrained(folder)
    return loaded.eval()


def main() -> Any:
    """Returns the images of the last pipeline call, [2, 16, 16, 3] in [0, 1]."""
    unet = load_model()
    from_data_loader = fxquant.compile(unet, DataLoader(NoisyImages(), batch_size=4))
    from_generator = fxquant.compile(unet, calls(8))
    from_trajectories = fxquant.compile(unet, chosen(unet, 32))
    images = None
    for qunet in (from_data_loader, from_generator, from_trajectories):
        pipeline = DDIMPipeline(unet=qunet, scheduler=DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            batch_size=2, num_inference_steps=5, generator=generator, output_type="np"
        ).images
        print(
            f"{type(qunet).__name__}: images {images.shape}, "
            f"{qunet.summary.bytes_after / 2**20:.2f} MiB"
        )
    return images


if __name__ == "__main__":
    main()
