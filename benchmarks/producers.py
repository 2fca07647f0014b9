"""What makes quantised activations on the CPU, against the machine's memory and against torch.

    python benchmarks/producers.py

bfloat16 images of Stable Diffusion 1.x at batch 2 become uint8. Bandwidth counts what an operator
has to read and write: inputs once, the results, and a group norm's input twice. Copying the same
inputs shows what the memory gives. Two settings: inputs that are in cache, as where the layer
before has just written them, and inputs that come from memory. torch's are the float operators in
bfloat16 alone, which write twice the bytes and quantise nothing. All take turns.

Prints tables and writes benchmarks/results/producers_cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import keep_shapes, kernel_options, show_table, spread, timed
from torch import Tensor

import fxquant.kernels.ops  # noqa: F401 - registers torch.ops.fxquant

SHAPES = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16))
QUICK = ((2, 32, 8, 8),)
MEMORY = 256 << 20  # bytes of inputs, more than caches hold
GROUPS, EPS = 32, 1e-5
Function = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure every shape."""
    options = kernel_options(__doc__)
    shapes, memory = (QUICK, 1 << 16) if options.quick else (SHAPES, MEMORY)
    rows = [measured(shape, memory, options.rounds) for shape in shapes]
    for row in rows:
        show(row)
    keep_shapes("producers_cpu", rows, options)


def measured(shape: tuple[int, int, int, int], memory: int, rounds: int) -> dict[str, Any]:
    """Seconds a call and bandwidth of every operator, from cache and from memory."""
    count = max(2, memory // (2 * torch.Size(shape).numel()))
    made = [torch.randn(shape).bfloat16().to(memory_format=torch.channels_last) for _ in range(2)]
    many = [made[k % 2].clone() for k in range(count)]
    operators = operators_of(shape[1])
    found: dict[str, dict[str, Any]] = {}
    for place, inputs in (("cache", [many[0]] * count), ("memory", many)):
        times: dict[str, list[float]] = {name: [] for name in operators}
        for turn in range(rounds + 1):
            for name, (function, _) in operators.items():
                seconds = timed(partial(every, function, inputs))[1] / count
                times[name] += [seconds] if turn else []
        for name, (_, traffic) in operators.items():
            per_call = spread(times[name])
            bandwidth = traffic * torch.Size(shape).numel() / per_call["median"]
            found.setdefault(name, {})[place] = {"seconds": per_call, "bytes_per_s": bandwidth}
    return {"shape": list(shape), "operators": found}


def every(function: Function, inputs: list[Tensor]) -> None:
    """Call it on each input."""
    for x in inputs:
        function(x)


def operators_of(channels: int) -> dict[str, tuple[Function, int]]:
    """name -> (a function of an image, bytes it has to move for every number)."""
    ops = torch.ops.fxquant
    row = torch.tensor([[0.02, 3.0]])
    weight, bias = torch.randn(channels), torch.randn(channels)
    narrow = (weight.bfloat16(), bias.bfloat16())
    to = (torch.uint8, "fused")

    def group_norm(x: Tensor, activation: str) -> Tensor:
        norm = ops.group_norm_silu_quantize
        return norm(x, row, 0, 8, weight, bias, GROUPS, EPS, activation, *to)

    def tokens(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2)

    return {
        "copy": (lambda x: x.clone(), 4),
        "quantise": (lambda x: ops.quantize(x, row, 0, 8, "none", *to), 3),
        "SiLU, quantise": (lambda x: ops.quantize(x, row, 0, 8, "silu", *to), 3),
        "group norm, quantise": (lambda x: group_norm(x, "none"), 5),
        "group norm, SiLU, quantise": (lambda x: group_norm(x, "silu"), 5),
        "layer norm, quantise": (
            lambda x: ops.layer_norm_quantize(tokens(x), row, 0, 8, weight, bias, EPS, *to),
            3,
        ),
        "upsample, quantise": (lambda x: ops.upsample_quantize(x, row, 0, 8, 2, *to), 6),
        "torch: group norm, SiLU": (lambda x: F.silu(F.group_norm(x, GROUPS, *narrow, EPS)), 6),
        "torch: layer norm": (lambda x: F.layer_norm(tokens(x), (channels,), *narrow, EPS), 4),
    }


def show(row: dict[str, Any]) -> None:
    """One shape's table."""
    lines = []
    for name, places in row["operators"].items():
        cells = [
            cell
            for place in ("cache", "memory")
            for cell in (
                f"{1e6 * places[place]['seconds']['median']:.0f}",
                f"{places[place]['bytes_per_s'] / 1e9:.0f}",
            )
        ]
        lines.append((name, *cells))
    headers = ("operator", "us, in cache", "GB/s", "us, from memory", "GB/s")
    show_table(f"producers {row['shape']}", headers, lines)


if __name__ == "__main__":
    main()
