"""The main job on a bundled model: compile the digits UNet to W8A8, sample, compare.

    make demo

Draws the same images with the float model, with bfloat16, with int8 (attention in bfloat16, and in
int8, too) and with int4 weights, from equal seeds, writes them side by side as a PNG, and prints
what each costs in quality and saves in size and time. The W8A8 models are compiled here; the W4A8
one was reconstructed by examples/compile_digits.py, which takes minutes, and is loaded.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import fxquant
from fxquant import assets
from fxquant.calibration import record
from fxquant.evaluate.digits import (
    balanced_labels,
    classifier_features,
    load_digits,
    recognition_rate,
    sample_digits,
)
from fxquant.evaluate.metrics import FDRatio, fd_ratio, frechet_distance, mean_psnr
from fxquant.runtime.summary import size_in_bytes

CALIBRATION_SEED, CALIBRATION_IMAGES = 1000, 60
BUNDLED = "w4a8-best (bundled)"
INT8_ATTENTION = "int8 attention"  # the recipe's, with q, k, v and weights of 8 bits
BRIEFLY = ("bf16", INT8_ATTENTION)  # sampled once, 256 images
SEEDS = (0, 1, 2)  # three sets of images; the pairs (0, 1), (1, 2), (2, 0) give the FD ratios
TIMED_BATCH = 64


def main() -> None:
    """Compile, sample, print the table, write the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="w8a8-fast")
    parser.add_argument("--images", type=int, default=2000, help="N of every figure")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()

    unet = assets.load_digits_unet()
    scheduler = assets.load_digits_scheduler()
    labels = balanced_labels(options.images // 10)

    def sample(model: nn.Module, seed: int, labels: Tensor = labels) -> Tensor:
        return sample_digits(model, scheduler, labels, steps=options.steps, seed=seed)

    calibration = balanced_labels(CALIBRATION_IMAGES // 10)
    calls = record(unet, lambda: sample(unet, CALIBRATION_SEED, calibration))
    qunet = fxquant.compile(unet, calls, recipe=options.recipe)
    int8_attention = fxquant.Recipe.parse(options.recipe).with_(attention="int8")
    print(f"{qunet.summary}\n")

    models = {"FP32": unet, "bf16": copy.deepcopy(unet).to(torch.bfloat16), options.recipe: qunet}
    models[INT8_ATTENTION] = fxquant.compile(unet, calls, recipe=int8_attention)
    models[BUNDLED] = fxquant.load(assets.path("digits") / "w4a8")
    speed = milliseconds(models)
    images = {
        name: [sample(model, seed) for seed in tqdm(SEEDS, desc=f"sample {name}", disable=None)]
        for name, model in models.items()
        if name not in BRIEFLY
    }
    images |= {name: [sample(models[name], SEEDS[0], labels[:256])] for name in BRIEFLY}
    Console(width=100).print(table(models, speed, images, labels, options.steps))
    options.out.mkdir(parents=True, exist_ok=True)
    shown = ["FP32", options.recipe, BUNDLED]
    grid([images[name][0] for name in shown], options.out / "demo.png")
    print(f"{options.out / 'demo.png'}: {', '.join(shown)} from left to right, equal seeds")


def milliseconds(models: dict[str, nn.Module], rounds: int = 15) -> dict[str, float]:
    """Median ms of one step at batch 64, the models taking turns."""
    steps = {name: step(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            if turn >= 2:  # the first turns compile, pack and warm caches
                times[name].append(time.perf_counter() - started)
    return {name: 1e3 * median(values) for name, values in times.items()}


def step(model: nn.Module) -> Callable[[], object]:
    """One UNet call of the timed batch."""
    x = torch.randn(TIMED_BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x, labels = x.to(model.dtype), torch.arange(TIMED_BATCH) % 10

    def run() -> object:
        with torch.no_grad():
            return model(x, torch.tensor(500), class_labels=labels, return_dict=False)

    return run


def table(
    models: dict[str, nn.Module],
    speed: dict[str, float],
    images: dict[str, list[Tensor]],
    labels: Tensor,
    steps: int,
) -> Table:
    """One column a model, one row a figure."""
    real = classifier_features(load_digits()[0])
    floats = [classifier_features(x) for x in images["FP32"]]
    columns = {}
    for name, model in models.items():
        sets = images[name]
        features = [classifier_features(x) for x in sets]
        full = len(sets) == len(SEEDS)
        fp = [x[: len(sets[0])] for x in images["FP32"]]
        columns[name] = [
            f"{size_in_bytes(model) / 2**20:.2f} MiB",
            f"{speed[name]:.2f}",
            "-"
            if name == "FP32"
            else f"{mean(mean_psnr(a, b) for a, b in zip(sets, fp, strict=False)):.1f} dB",
            "-" if name == "FP32" or not full else spread(fd_ratios(features, floats)),
            f"{mean(frechet_distance(f, real) for f in features):.3f}" if full else "-",
            f"{100 * mean(recognition_rate(x, labels[: len(x)]) for x in sets):.2f} %",
        ]
    rows = [
        "weights",
        f"ms / step, batch {TIMED_BATCH}",
        "PSNR to FP32",
        "FD ratio, mean (min-max)",
        "FD to the real digits",
        "recognised by the classifier",
    ]
    result = Table(
        title=f"digits, DDIM {steps} steps, N = {len(labels):,} images a seed; "
        f"{' and '.join(BRIEFLY)}: 256 images"
    )
    for header in ("", *models):
        result.add_column(header, justify="left" if not header else "right")
    for k, row in enumerate(rows):
        result.add_row(row, *(columns[name][k] for name in models))
    return result


def fd_ratios(quantised: list[Tensor], floats: list[Tensor]) -> list[FDRatio]:
    """Seeds B against seeds A for the three pairs (A, B)."""
    pairs = [(k, (k + 1) % len(SEEDS)) for k in range(len(SEEDS))]
    return [fd_ratio(quantised[b], floats[b], floats[a]) for a, b in pairs]


def spread(ratios: list[FDRatio]) -> str:
    """mean (min-max)"""
    values = [r.ratio for r in ratios]
    return f"{mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def grid(sets: list[Tensor], path: Path, rows: int = 8, columns: int = 10, zoom: int = 3) -> None:
    """Images [N, 1, 16, 16] in [-1, 1] of some models, each as rows x columns, side by side."""
    gap = torch.ones(rows * 16, 4)
    parts: list[Tensor] = []
    for images in sets:
        tiles = images[: rows * columns].reshape(rows, columns, 16, 16)
        parts += [gap, tiles.permute(0, 2, 1, 3).reshape(rows * 16, columns * 16)]
    pixels = ((torch.cat(parts[1:], dim=1) + 1) * 127.5).round().byte()
    picture = Image.fromarray(pixels.numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(
        path
    )


if __name__ == "__main__":
    main()
