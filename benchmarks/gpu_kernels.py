"""Each layer of SD 1.x and SDXL by itself on a GPU: our kernels and PyTorch's.

    python benchmarks/gpu_kernels.py --tune --budget 150

What is multiplied in one step of a batch of 2 (kernels/cutlass/shapes.py). Ours: int8 activations
and int8 (W8A8) or int4 (W4A8) weights, dequantised to float16 with a bias, by the fastest of the
tiles that are built. Theirs: float16 with a bias by cuBLASLt (linears) and cuDNN (channels_last,
benchmark mode), and torch._int_mm, which gives int32 sums only. Captured in CUDA graphs, on as many
copies of the tensors as no cache holds; all systems of a layer take turns, medians count.

Then the kernels that make quantised activations, by the bytes that they must move a second, beside
a plain copy.

--tune also measures int8 outputs, and writes the fastest tiles to kernels/cutlass/measured, where
they are chosen from. Prints tables last, and writes benchmarks/results/gpu_kernels.json. Exits with
2 without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import HERE, RESULTS, arguments, command_line, keep, show_table, spread
from gpu_common import gpu, need_gpu
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.kernels.cuda import producers
from fxquant.kernels.cutlass import choose, shapes, tune
from fxquant.kernels.cutlass.shapes import Conv, Linear
from fxquant.kernels.cutlass.tune import Call, Layer, Operands

Report = dict[str, Any]
OURS, W4, INT_MM = "W8A8", "W4A8", "torch._int_mm"
FLOAT16 = {"gemm": "cuBLASLt fp16", "conv": "cuDNN fp16"}
MEASURED = HERE.parent / "kernels" / "cutlass" / "measured"
_FOR_PRODUCERS = 15.0  # seconds kept for them


def main() -> None:
    """Measure what there is time for, keep it, and show it."""
    options = parsed()
    need_gpu()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.preferred_blas_library("cublaslt")
    end = time.monotonic() + (options.budget or float("inf"))
    report: Report = {
        "machine": gpu(),
        "command": command_line(),
        "rounds": options.rounds,
        "layers": [],
        "producers": [],
        "cut": 0,
    }
    try:
        measure_layers(report, options, end - _FOR_PRODUCERS)
        report["copy_bytes_per_second"], report["producers"] = measure_producers(options.rounds)
    finally:
        report["summary"] = summary(report["layers"])
        keep("gpu_kernels", report, options.results)
        show(report)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--arch", nargs="+", choices=[*shapes.CONVS], default=["sdxl", "sd14"], metavar="NAME",
        help=f"of: {', '.join(shapes.CONVS)}; default sdxl sd14",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tune", action="store_true", help="write the table of tiles")
    parser.add_argument("--budget", type=float, help="seconds; layers beyond that are left out")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return parser.parse_args()


# Layers


def measure_layers(report: Report, options: argparse.Namespace, end: float) -> None:
    """A row for each layer until ``end``; the table of tiles with --tune."""
    rows: dict[choose.Problem, tune.Row] = {}
    wanted = [
        (arch, s) for arch in options.arch for s in (*shapes.LINEARS[arch], *shapes.CONVS[arch])
    ]
    for number, (arch, shape) in enumerate(wanted):
        if time.monotonic() > end:
            report["cut"] = len(wanted) - number
            note(f"no time for {report['cut']} of {len(wanted)} layers")
            break
        row, tuned = measure_layer(shape, options.rounds, options.tune)
        report["layers"].append({"arch": arch} | row)
        rows |= {new[0]: new for new in tuned if new[0] not in rows}
        note(f"[{number + 1}/{len(wanted)}] {arch} {line(row)}")
    if options.tune and rows:
        name = torch.cuda.get_device_name()
        path = MEASURED / choose.tuned_path(name).name
        tune.keep(path, name, rows.values())
        note(f"wrote {path}")


def measure_layer(shape: Linear | Conv, rounds: int, tuning: bool) -> tuple[Report, list[tune.Row]]:
    """One layer by every system; and, if asked for, its rows of the table of tiles."""
    layer, tuned = Layer(shape), list[tune.Row]()
    operands = Operands(layer)
    times = tune.tile_times(operands, "f16", others(operands), rounds)
    tiles, systems = split(times)
    row: Report = {"op": layer.op, **shape._asdict(), "sizes": layer.sizes}
    row |= {"operations": layer.operations, "tiles": {}, "systems": {}}
    for name, found in systems.items():
        row["systems"][name] = figures(found)
    tuned += best(row, OURS, tiles, layer)
    four = Layer(shape, bits=4)
    tuned_four = best(
        row, W4, split(tune.tile_times(Operands(four), "f16", rounds=rounds))[0], four
    )
    if layer.op == "gemm":  # convolutions unpack to int8 and take its tiles
        tuned += tuned_four
    if tuning:
        for made in [layer] + ([four] if layer.op == "gemm" else []):
            mine = operands if made is layer else Operands(made)
            found = tune.tile_times(mine, "s8", rounds=rounds)
            tuned += tune.rows_of(made.problem("s8"), found) if found else []
    return row, tuned


def best(row: Report, name: str, tiles: tune.Times, layer: Layer) -> list[tune.Row]:
    """Enter a system of ours: its fastest tile."""
    if not tiles:
        return []
    row["tiles"][name] = {tile: round(median(found), 3) for tile, found in tiles.items()}
    rows = tune.rows_of(layer.problem("f16"), tiles)
    _, tile, found = rows[0]
    row["systems"][name] = {**figures(found), "tile": tile}
    return rows


def split(times: tune.Times) -> tuple[tune.Times, tune.Times]:
    """Those of tiles, and of other systems."""
    others_ = {*FLOAT16.values(), INT_MM}
    tiles = {name: t for name, t in times.items() if name not in others_}
    return tiles, {name: t for name, t in times.items() if name in others_}


def figures(microseconds: Sequence[float]) -> Report:
    """Of the rounds."""
    return {"microseconds": spread(list(microseconds))}


def others(operands: Operands) -> dict[str, list[Call]]:
    """PyTorch's own, on as many copies."""
    layer = operands.layer
    systems = {FLOAT16[layer.op]: [float16(layer.shape) for _ in range(layer.copies)]}
    if isinstance(layer.shape, Linear):
        systems[INT_MM] = [functools.partial(torch._int_mm, x, w.t()) for x, w in operands.pairs]
    return systems


def float16(shape: Linear | Conv) -> Call:
    """The layer in float16 on tensors of its own."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
    bias = torch.randn(shape.n, **half)
    if isinstance(shape, Linear):
        x, weight = torch.randn(shape.m, shape.k, **half), torch.randn(shape.n, shape.k, **half)
        return functools.partial(F.linear, x, weight, bias)
    x = torch.randn(shapes.BATCH, shape.channels, shape.size, shape.size, **half)
    weight = torch.randn(shape.n, shape.channels, shape.kernel, shape.kernel, **half)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return functools.partial(F.conv2d, x, weight, bias, shape.stride, shape.kernel // 2)


# Producers


def measure_producers(rounds: int) -> tuple[float, list[Report]]:
    """Bytes a second of a copy, and a row for each kernel and size."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = tune.microseconds({"copy": [functools.partial(target.copy_, source)]}, rounds)
    copy = 2 * source.numel() / median(times["copy"]) * 1e6
    del source, target
    found = []
    for name, sizes, make in producer_calls():
        try:
            call, moved = make()
            calls = [call] + [make()[0] for _ in range(copies(moved) - 1)]
            times = tune.microseconds({name: calls}, rounds)
        except BackendError as error:
            note(f"{name} {sizes}: {error}")
            continue
        speed = moved / median(times[name]) * 1e6
        found.append(
            {"op": name, "sizes": sizes, "bytes": moved, **figures(times[name]),
             "bytes_per_second": speed, "of_copy": speed / copy}
        )  # fmt: skip
    return copy, found


def copies(moved: int) -> int:
    """How many sets of tensors no cache holds."""
    return max(2, min(64, math.ceil(200 * 2**20 / moved)))


def producer_calls() -> Iterator[tuple[str, str, Callable[[], tuple[Call, int]]]]:
    """Name, sizes, and what makes a call and the bytes that it must move; SDXL's sizes."""
    for channels, size in ((320, 128), (640, 64), (1280, 32)):
        image, tokens = (2, channels, size, size), (2, size * size, channels)
        yield "quantize", shown(image), functools.partial(made, "quantize", image)
        yield "group_norm_silu_quantize", shown(image), functools.partial(made, "norm", image)
        yield "add_quantize", shown(image), functools.partial(made, "add", image)
        yield "cat_quantize", f"2 of {shown(image)}", functools.partial(made, "cat", image)
        yield "upsample_quantize", shown(image), functools.partial(made, "upsample", image)
        if channels > 320:
            yield "layer_norm_quantize", shown(tokens), functools.partial(made, "layer", tokens)
            wide = (2, size * size, 8 * channels)
            yield "geglu_quantize", shown(wide), functools.partial(made, "geglu", wide)


def made(kind: str, shape: tuple[int, ...]) -> tuple[Call, int]:
    """A call of a producer on float16 tensors, and the bytes that it must read and write."""
    row = torch.tensor([[0.02, 3.0]], device="cuda")
    x, count = halves(shape), math.prod(shape)
    end = (row, 0, 8)
    affine = torch.ones(shape[1] if len(shape) == 4 else shape[-1], device="cuda")
    int8 = torch.int8
    calls: dict[str, tuple[Call, int]] = {
        "quantize": (functools.partial(producers.quantize, x, *end, "none", int8), 3),
        "norm": (
            functools.partial(
                producers.group_norm_silu_quantize, x, *end, affine, affine, 32, 1e-5, "silu", int8
            ),
            3,
        ),
        "layer": (
            functools.partial(producers.layer_norm_quantize, x, *end, affine, affine, 1e-5, int8),
            3,
        ),
        "upsample": (functools.partial(producers.upsample_quantize, x, *end, 2, int8), 6),
    }
    if kind == "add":
        return functools.partial(producers.add_quantize, x, halves(shape), *end, int8), 5 * count
    if kind == "cat":
        both = [x, halves(shape)]
        return functools.partial(producers.cat_quantize, both, *end, 1, int8), 6 * count
    if kind == "geglu":
        return functools.partial(producers.geglu_quantize, x, *end, "none", int8), 5 * count // 2
    call, each = calls[kind]
    return call, each * count


def halves(shape: tuple[int, ...]) -> Tensor:
    """Random float16, images channels last."""
    x = torch.randn(shape, dtype=torch.float16, device="cuda")
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# What came of it


def summary(layers: list[Report]) -> Report:
    """By architecture, kind of layer and rival: how much faster ours are."""
    result: Report = {}
    for arch in dict.fromkeys(row["arch"] for row in layers):
        for kind, fits in KINDS.items():
            rows = [row for row in layers if row["arch"] == arch and fits(row)]
            for ours, theirs in PAIRS:
                both = [row for row in rows if {ours, theirs} <= row["systems"].keys()]
                if both:
                    result.setdefault(arch, {}).setdefault(kind, {})[f"{ours} / {theirs}"] = ratios(
                        both, ours, theirs
                    )
    return result


KINDS: dict[str, Callable[[Report], bool]] = {
    "linear": lambda row: row["op"] == "gemm",
    "conv": lambda row: row["op"] == "conv",
    "conv 3x3": lambda row: row["op"] == "conv" and row["kernel"] == 3,
}
PAIRS = [(ours, t) for ours in (OURS, W4) for t in (*FLOAT16.values(), INT_MM)]


def ratios(rows: list[Report], ours: str, theirs: str) -> Report:
    """Geometric mean over the layers, ends, and of the time of all layers in a step."""
    each = [micro(row, theirs) / micro(row, ours) for row in rows]
    total = {s: sum(row["count"] * micro(row, s) for row in rows) for s in (ours, theirs)}
    rates = [row["operations"] / micro(row, ours) * 1e-6 for row in rows]
    return {
        "layers": len(rows),
        "geometric_mean": geometric_mean(each),
        "min": min(each),
        "max": max(each),
        "of_a_step": total[theirs] / total[ours],
        "geometric_mean_tops": geometric_mean(rates),
        "best_tops": max(rates),
    }


def micro(row: Report, system: str) -> float:
    """Median microseconds."""
    return float(row["systems"][system]["microseconds"]["median"])


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def line(row: Report) -> str:
    """A layer: sizes, and TOPS of each system."""
    rates = (f"{name} {row['operations'] / micro(row, name) * 1e-6:.0f}" for name in row["systems"])
    return f"{row['op']} {shown(row['sizes'])}: {', '.join(rates)} TOPS"


def show(report: Report) -> None:
    """Producers, then the means over the layers."""
    if report["producers"]:
        copy = report["copy_bytes_per_second"] / 1e9
        show_table(
            f"producers, GB/s; a copy moves {copy:.0f}",
            ("kernel", "sizes", "us", "GB/s", "of a copy"),
            [
                (r["op"], r["sizes"], f"{r['microseconds']['median']:.1f}",
                 f"{r['bytes_per_second'] / 1e9:.0f}", f"{r['of_copy']:.2f}")
                for r in report["producers"]
            ],
        )  # fmt: skip
    show_table(
        f"times faster on {report['machine']['gpu']}",
        ("", "ours / theirs", "layers", "mean", "min - max", "step", "TOPS", "best"),
        [
            (f"{arch} {kind}", pair, str(r["layers"]), f"{r['geometric_mean']:.2f}",
             f"{r['min']:.2f} - {r['max']:.2f}", f"{r['of_a_step']:.2f}",
             f"{r['geometric_mean_tops']:.0f}", f"{r['best_tops']:.0f}")
            for arch, kinds in report["summary"].items()
            for kind, pairs in kinds.items()
            for pair, r in pairs.items()
        ],
    )  # fmt: skip
    if report["cut"]:
        print(f"cut: {report['cut']} layers, for want of time")


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
