"""Train the bundled models: the digits classifier and the class-conditional digits DDPM.

    python examples/train_digits.py --steps 5000 --out fxquant/assets/digits --seed 0

Writes a diffusers folder (unet/, scheduler/), classifier/model.safetensors, samples.png and
report.json. The rates in the report come from the stored float16 weights, loaded back as float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import matplotlib.image
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fxquant.evaluate.digits import (
    DigitsClassifier,
    DigitsSplit,
    balanced_labels,
    classifier_features,
    load_split,
    recognition_rate,
    sample_digits,
)
from fxquant.evaluate.metrics import frechet_distance

CLASSIFIER_EPOCHS = 40
WARMUP_STEPS = 200
EMA_DECAY = 0.999
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def build_unet() -> UNet2DModel:
    """A 1.6 M-parameter UNet with attention at 4x4; takes x [N, 1, 16, 16], t and labels [N]."""
    unet: UNet2DModel = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
        downsample_padding=0,
        norm_num_groups=16,
        attention_head_dim=16,
    )
    return unet


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10 degrees and shift by up to 1.5 pixels, filling with background (-1)."""
    count = len(images)
    angle, dx, dy = (2 * torch.rand(3, count, generator=generator) - 1).unbind()
    angle, dx, dy = angle * math.radians(10), dx * 1.5 / 8, dy * 1.5 / 8
    top = torch.stack([angle.cos(), -angle.sin(), dx], dim=1)
    bottom = torch.stack([angle.sin(), angle.cos(), dy], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_classifier(data: DigitsSplit, seed: int) -> DigitsClassifier:
    """Train on the augmented train split only; about half a minute."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, batch = DigitsClassifier().train(), 64
    steps = CLASSIFIER_EPOCHS * (len(data.train_images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="classifier", mininterval=5):
        pick = torch.randint(len(data.train_images), (batch,), generator=generator)
        logits = model(augment(data.train_images[pick], generator))
        loss = F.cross_entropy(logits, data.train_labels[pick], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARMUP_STEPS) / (steps - WARMUP_STEPS))))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int) -> None:
    """Move the average towards the model; the decay grows from 0.1 to EMA_DECAY."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def noise_loss(
    unet: UNet2DModel, scheduler: DDPMScheduler, x: Tensor, labels: Tensor, rng: torch.Generator
) -> Tensor:
    """Epsilon-prediction mean squared error (a scalar) at uniformly drawn timesteps."""
    noise = torch.randn(x.shape, generator=rng)
    t = torch.randint(scheduler.config["num_train_timesteps"], (len(x),), generator=rng)
    noisy = scheduler.add_noise(x, noise, t)  # type: ignore[arg-type]  # it asks for an IntTensor
    return F.mse_loss(unet(noisy, t, class_labels=labels).sample, noise)


def train_unet(
    data: DigitsSplit, *, steps: int, batch: int, lr: float, seed: int, snapshot: Path
) -> tuple[UNet2DModel, float]:
    """Returns the averaged model in eval mode and the mean loss over the last 200 steps.

    Saves the average to `snapshot` every 1,000 steps, so that a long run can be looked at.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    unet, scheduler = build_unet().train(), DDPMScheduler(**SCHEDULE)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    losses: list[float] = []
    progress = tqdm(range(steps), desc="unet", mininterval=10)
    for step in progress:
        pick = torch.randint(len(data.train_images), (batch,), generator=rng)
        loss = noise_loss(unet, scheduler, data.train_images[pick], data.train_labels[pick], rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, unet, step)
        losses = [*losses[-199:], loss.item()]
        progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
        if step % 1000 == 999:
            ema.save_pretrained(snapshot)
    return ema, sum(losses) / len(losses)


def save(out: Path, unet: UNet2DModel, classifier: DigitsClassifier) -> None:
    """Write the diffusers folder; the UNet is stored in float16."""
    copy.deepcopy(unet).half().save_pretrained(out / "unet")
    DDIMScheduler(**SCHEDULE).save_pretrained(out / "scheduler")
    (out / "classifier").mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), out / "classifier" / "model.safetensors")


def write_grid(images: Tensor, file: Path, columns: int = 20, zoom: int = 3) -> None:
    """Images [N, 1, 16, 16] in [-1, 1] -> one grey PNG; N must be a multiple of `columns`."""
    tiles = F.pad(images[:, 0].clamp(-1, 1), (1, 1, 1, 1), value=0.0)
    size = tiles.shape[-1]
    grid = tiles.reshape(-1, columns, size, size).transpose(1, 2).reshape(-1, columns * size)
    large = grid.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    matplotlib.image.imsave(file, large.numpy(), cmap="gray", vmin=-1, vmax=1)


def evaluate(out: Path, data: DigitsSplit, classifier: DigitsClassifier) -> dict[str, float]:
    """Sample 100 images per class from the stored model and compare them with the real digits."""
    unet = UNet2DModel.from_pretrained(
        out / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    ).eval()
    labels = balanced_labels(100)
    began = time.perf_counter()
    images = sample_digits(unet, DDIMScheduler.from_pretrained(out / "scheduler"), labels)
    seconds = time.perf_counter() - began
    write_grid(images[:200], out / "samples.png")
    fake, train, held_out = (
        classifier_features(x, classifier)
        for x in (images, data.train_images, data.held_out_images)
    )
    return {
        "samples": len(images),
        "sampling_s": round(seconds, 1),
        "recognition_rate": recognition_rate(images, labels, classifier),
        "held_out_accuracy": recognition_rate(
            data.held_out_images, data.held_out_labels, classifier
        ),
        "fd_to_train": frechet_distance(fake, train),
        "fd_to_held_out": frechet_distance(fake, held_out),
        "fd_train_to_held_out": frechet_distance(train, held_out),
    }


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("fxquant/assets/digits"))
    parser.add_argument("--snapshot", type=Path, default=Path("build/digits_snapshot"))
    return parser.parse_args()


def main() -> None:
    """Train both models, store them, evaluate what was stored."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    data = load_split()
    began = time.perf_counter()
    classifier = train_classifier(data, args.seed)
    accuracy = recognition_rate(data.held_out_images, data.held_out_labels, classifier)
    print(f"classifier: {accuracy:.4f} on {len(data.held_out_labels)} held-out digits")
    unet, loss = train_unet(
        data,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        snapshot=args.snapshot,
    )
    seconds = time.perf_counter() - began
    save(args.out, unet, classifier)
    report = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    report |= {"train_s": round(seconds, 1), "final_loss": loss}
    report |= evaluate(args.out, data, classifier)
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
