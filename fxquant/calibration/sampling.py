"""Plain sampling loops: seeded, and the same images whatever the batch size."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.logs import progress as progress_bar


@torch.no_grad()
def sample_ddim(
    model: nn.Module,
    scheduler: Any,
    *,
    class_labels: Tensor | None = None,
    count: int | None = None,
    steps: int = 50,
    seed: int = 0,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Images of a UNet2DModel, or of anything with its signature and `config`.

    All noise is drawn at once on the CPU, so equal seeds start equal images at any batch size, on
    any device.

    Args:
        model: called as model(x, t, class_labels=..., return_dict=False); `config` gives channels
            and size, `device` and `dtype` (CPU and float32 without them) where and how it runs.
        scheduler: a diffusers DDIMScheduler; a copy of it is used.
        class_labels: [N] int64, one an image; None for an unconditional model.
        count: N, needed only without labels.
        generator: a CPU generator to draw the noise from instead of `seed`.
        progress: show a bar if it takes over two seconds and standard error is a terminal.

    Returns:
        [N, C, H, W] float32 on the CPU, in the model's own range, not clamped.

    Raises:
        ValueError: no images asked for, labels that are not [N], `steps` or `batch_size` below 1,
            or a generator that is not on the CPU.
    """
    count = _count(class_labels, count)
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be 1 or more, got {steps} and {batch_size}")
    noise = _noise(model.config, count, seed, generator)
    images = []
    with progress_bar(what="sample", unit="step", total=count * steps, show=progress) as bar:
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            labels = {} if class_labels is None else {"class_labels": class_labels[part]}
            images.append(
                denoise(model, scheduler, noise[part], steps=steps, conditions=labels, bar=bar)
            )
    return torch.cat(images)


@torch.no_grad()
def denoise(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    *,
    steps: int,
    conditions: Mapping[str, Tensor] | None = None,
    unconditional: Mapping[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    bar: tqdm[Any] | None = None,
) -> Tensor:
    """One batch from noise to images, or latents, with any diffusers scheduler.

    Args:
        model: called as model(x, t, **conditions, return_dict=False); its `device` and `dtype` (CPU
            and float32 without them) say where and how it runs.
        scheduler: DDIM, PNDM, DPM-Solver++, Euler or alike; a copy of it is used.
        noise: [B, C, H, W] standard normal; scaled as the scheduler wants it.
        conditions: flat keyword arguments [B, ...] such as class_labels, encoder_hidden_states.
        unconditional: the same ones for classifier-free guidance: the model then runs on 2 B rows,
            [unconditional; conditional]. None for no guidance.
        guidance_scale: prediction = unconditional + scale * (conditional - unconditional).
        generator: of the noise that a stochastic scheduler adds.
        bar: counts images times steps.

    Returns:
        [B, C, H, W] float32 on the CPU, in the model's own range, not clamped.

    Raises:
        ValueError: `unconditional` names other arguments than `conditions`.
    """
    device, dtype = getattr(model, "device", "cpu"), getattr(model, "dtype", torch.float32)
    condition = _conditions(conditions or {}, unconditional, device)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    x = noise.to(device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x if unconditional is None else torch.cat([x, x]), t)
        predicted = model(scaled.to(dtype), t, **condition, return_dict=False)[0].to(x.dtype)
        if unconditional is not None:
            without, given = predicted.chunk(2)
            predicted = without + guidance_scale * (given - without)
        x = scheduler.step(predicted, t, x, **extra).prev_sample
        if bar is not None:
            bar.update(len(x))
    return x.float().cpu()


def _conditions(
    given: Mapping[str, Tensor], without: Mapping[str, Tensor] | None, device: Any
) -> dict[str, Tensor]:
    if without is None:
        return {name: tensor.to(device) for name, tensor in given.items()}
    if set(without) != set(given):
        raise ValueError(
            f"unconditional has {sorted(without)}, conditions has {sorted(given)}; guidance needs "
            "the same arguments in both"
        )
    return {name: torch.cat([without[name], given[name]]).to(device) for name in given}


def _count(class_labels: Tensor | None, count: int | None) -> int:
    if class_labels is None:
        if not count or count < 1:
            raise ValueError(
                f"say how many images: class_labels, or a count of 1 or more, not {count}"
            )
        return count
    if class_labels.ndim != 1 or not len(class_labels) or count not in (None, len(class_labels)):
        given = list(class_labels.shape)
        raise ValueError(f"class_labels must be [N], one an image, got {given} with count={count}")
    return len(class_labels)


def _noise(config: Any, count: int, seed: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal [N, C, H, W] float32 on the CPU."""
    generator = generator or torch.Generator().manual_seed(seed)
    if generator.device.type != "cpu":
        raise ValueError(f"the generator must be on the CPU, got one on {generator.device}")
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, config.in_channels, height, width, generator=generator)
