"""Attention on the CPU: ours in bfloat16 and int8 against torch's in bfloat16.

    python benchmarks/attention.py

The shapes of Stable Diffusion 1.x and SDXL at batch 2. All take turns on the same values; errors
are relative L2 to float64 on these values (bfloat16) and to the integers' own values (int8: what
q, k and v lose when they are rounded is the recipe's, not the kernel's).

Prints a table and writes benchmarks/results/attention_cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import keep_shapes, kernel_options, show_table, spread, timed
from torch import Tensor

import fxquant.kernels.ops  # noqa: F401 - registers torch.ops.fxquant

# batch, heads, queries, keys, channels
SHAPES = {
    "SD 1.x 64x64": (2, 8, 4096, 4096, 40),
    "SD 1.x 32x32": (2, 8, 1024, 1024, 80),
    "SD 1.x 16x16": (2, 8, 256, 256, 160),
    "SD 1.x 64x64, text": (2, 8, 4096, 77, 40),
    "SDXL 32x32": (2, 10, 1024, 1024, 64),
    "SDXL 64x64": (2, 10, 4096, 4096, 64),
}
QUICK = {"quick": (1, 2, 256, 77, 40)}
TORCH, BF16, INT8 = "torch bf16", "fxquant bf16", "fxquant int8"


def main() -> None:
    """Measure every shape."""
    options = kernel_options(__doc__)
    shapes = QUICK if options.quick else SHAPES
    rows = {name: measured(shape, options.rounds) for name, shape in shapes.items()}
    show(rows)
    keep_shapes("attention_cpu", rows, options)


def measured(shape: tuple[int, int, int, int, int], rounds: int) -> dict[str, Any]:
    """Seconds and error of every implementation."""
    batch, heads, queries, keys, channels = shape
    floats = [tokens(batch, n, heads, channels, k) for k, n in enumerate((queries, keys, keys))]
    q, k, v = (x.bfloat16() for x in floats)
    rows, integers = zip(*(quantised(x) for x in floats), strict=True)
    row = torch.stack(rows)
    attend = torch.ops.fxquant.attention
    rest = (None, None, -1, 8, torch.bfloat16, "fused")
    systems: dict[str, Callable[[], Tensor]] = {
        TORCH: lambda: F.scaled_dot_product_attention(q, k, v),
        BF16: lambda: attend(q, k, v, row, -1, -1, -1, *rest),
        INT8: lambda: attend(*integers, row, 0, 1, 2, *rest),
    }
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, function in systems.items():
            seconds = timed(function)[1]
            times[name] += [seconds] if turn else []
    reals = [(x.double() - 128 - r[1]) * r[0] for x, r in zip(integers, rows, strict=True)]
    truths = {INT8: truth(*reals), BF16: truth(q, k, v)}
    return {
        "shape": list(shape),
        "operations": 4 * batch * heads * queries * keys * channels,
        "systems": {
            name: {
                "seconds": spread(times[name]),
                "error": error(function(), truths.get(name, truths[BF16])),
            }
            for name, function in systems.items()
        },
    }


def tokens(batch: int, count: int, heads: int, channels: int, seed: int) -> Tensor:
    """[batch, heads, count, channels] in the memory order that a linear layer leaves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, heads, channels, generator=generator).transpose(1, 2)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of x's range, and its uint8 integers in x's memory order."""
    low, high = x.aminmax()
    scale = (high - low) / 255
    zero_point = torch.round(-low / scale) - 128
    q = (torch.round(x / scale) + zero_point).clamp(-128, 127) + 128
    return torch.stack((scale, zero_point)), q.to(torch.uint8)


def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, a head at a time: the score matrix is large."""
    heads = [
        F.scaled_dot_product_attention(*(x[:, [h]].double() for x in (q, k, v)))
        for h in range(q.shape[1])
    ]
    return torch.cat(heads, 1)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((found.double() - expected).norm() / expected.norm())


def show(rows: dict[str, dict[str, Any]]) -> None:
    """The table."""
    lines = []
    for name, row in rows.items():
        base = row["systems"][TORCH]["seconds"]["median"]
        for system, found in row["systems"].items():
            seconds = found["seconds"]["median"]
            lines.append(
                (
                    f"{name} {row['shape']}" if system == TORCH else "",
                    system,
                    f"{1e3 * seconds:.2f}",
                    f"{row['operations'] / seconds / 1e9:.0f}",
                    f"{base / seconds:.2f}",
                    f"{found['error']:.1e}",
                )
            )
    show_table("attention", ("shape", "system", "ms", "GOPS", "x torch", "error"), lines)


if __name__ == "__main__":
    main()
