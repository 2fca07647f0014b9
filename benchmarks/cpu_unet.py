"""One UNet step on the CPU: fp32 eager, bf16 eager, fxquant W8A8, in one interleaved run.

    python benchmarks/cpu_unet.py --arch sd14

Random weights from the published configuration at full width: time and memory do not depend on
training. Also measured: fxquant's own overhead of compiling (all wall time but the calibration
forwards; kernel cache cold, C++ compiles and weight packing included), the process's peak memory
up to the end of compilation, and that one compile serves other batches and resolutions.

Prints a table and writes benchmarks/results/cpu_unet_ARCH.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "tests" / "configs"
ARCHES = {"sd14": "sd14", "sdxl": "sdxl_base", "ddpm": "ddpm_cifar10_32", "ldm": "ldm_celebahq_256"}
GIB = 2**30


def main() -> None:
    """Compile, time, check shapes, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", choices=[*ARCHES, "digits"], default="sd14")
    parser.add_argument(
        "--batch", type=int, default=2, help="of the timed step; 2 is one image with guidance"
    )
    parser.add_argument(
        "--size", type=int, help="height and width of the latents; the config's by default"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=4, help="calibration calls")
    parser.add_argument("--recipe", default="w8a8-fast")
    options = parser.parse_args()

    torch.manual_seed(0)
    unet = build(options.arch)
    with cold_cache():
        report = compile_report(unet, options)
        systems = report.pop("systems")
        report["seconds_per_step"] = interleaved(systems, options.rounds)
        report["relative_l2_to_fp32"] = errors(systems)
    show(report)
    path = HERE / "results" / f"cpu_unet_{options.arch}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


def build(arch: str) -> nn.Module:
    """The float32 model, channels_last, eval mode."""
    if arch == "digits":
        from fxquant import assets

        return assets.load_digits_unet()
    config = json.loads((CONFIGS / f"{ARCHES[arch]}.json").read_text())
    model = getattr(diffusers, config["_class_name"]).from_config(config)
    return model.eval().to(memory_format=torch.channels_last)


class cold_cache:  # noqa: N801 - reads as a verb: with cold_cache()
    """An empty kernel cache for the duration."""

    def __enter__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="fxquant-bench-")
        os.environ["FXQUANT_CACHE"] = self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def compile_report(unet: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Compile once, measure it, and return the figures and the systems to time."""
    from fxquant import compile as fxquant_compile
    from fxquant.calibration.example import example_call

    def call(batch: int, size: int | None, seed: int = 0) -> dict[str, Any]:
        return example_call(unet, batch=batch, size=size, seed=seed)

    calibration = [call(options.batch, options.size, seed=k) for k in range(options.calls)]
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    qunet, compile_seconds = timed(lambda: fxquant_compile(unet, calibration, options.recipe))
    _, first_step = timed(lambda: run(qunet, calibration[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _, second_step = timed(lambda: run(qunet, calibration[0]))
    forwards = sum(timed(lambda c=c: run(unet, c))[1] for c in calibration)
    sizes = [(1, None), (2, None), (4, None), (2, (6, 10))]
    served = [shape_of(run(qunet, oblong(call(b, options.size), ratio))) for b, ratio in sizes]
    bf16 = type(unet).from_config(unet.config).eval().to(torch.bfloat16)
    bf16.load_state_dict(unet.state_dict())
    bf16 = bf16.to(memory_format=torch.channels_last)
    step = calibration[-1]
    return {
        "machine": machine(),
        "command": " ".join(["python", *sys.argv]),
        "arch": options.arch,
        "batch": options.batch,
        "sample_shape": list(step["sample"].shape),
        "fp32_weights_gib": weights / GIB,
        "fxquant_weights_gib": qunet.summary.bytes_after / GIB,
        "compile": {
            "calls": options.calls,
            "seconds": compile_seconds,
            "phases": qunet.summary.seconds,
            "float_forwards_seconds": forwards,
            "first_step_extra_seconds": max(0.0, first_step - second_step),
            "own_overhead_seconds": compile_seconds - forwards + max(0.0, first_step - second_step),
            "peak_memory_gib": peak / GIB,
            "peak_memory_over_fp32_weights": peak / weights,
        },
        "served_shapes": served,
        "kernels": dict(qunet.summary.kernels),
        "systems": {
            "fp32 eager": lambda: run(unet, step),
            "bf16 eager": lambda: run(bf16, as_dtype(step, torch.bfloat16)),
            f"fxquant {options.recipe}": lambda: run(qunet, step),
        },
    }


def run(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """The model's result on one call."""
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def oblong(call: dict[str, Any], ratio: tuple[int, int] | None) -> dict[str, Any]:
    """The call with another aspect: (6, 10) makes 48x80 of 64x64."""
    if ratio is None:
        return call
    batch, channels, side, _ = call["sample"].shape
    return call | {
        "sample": torch.randn(batch, channels, side * ratio[0] // 8, side * ratio[1] // 8)
    }


def shape_of(x: torch.Tensor) -> list[int]:
    """Its shape; the values must be finite."""
    assert torch.isfinite(x).all()
    return list(x.shape)


def as_dtype(call: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a call in another dtype."""
    if isinstance(call, dict):
        return {k: as_dtype(v, dtype) for k, v in call.items()}
    return call.to(dtype) if isinstance(call, torch.Tensor) and call.is_floating_point() else call


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """(result, wall seconds)."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def interleaved(systems: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum seconds of each system; they take turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, function in systems.items():
            seconds = timed(function)[1]
            if turn:
                times[name].append(seconds)
    return {n: {"median": median(v), "min": min(v), "max": max(v)} for n, v in times.items()}


def errors(systems: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Relative L2 error to the first system on the same input."""
    results = {name: function().double() for name, function in systems.items()}
    truth = next(iter(results.values()))
    return {name: float((x - truth).norm() / truth.norm()) for name, x in results.items()}


def machine() -> dict[str, Any]:
    """Where and with what this ran."""
    model = next(
        (x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        "",
    )
    return {
        "cpu": model.partition(":")[2].strip() or platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def show(report: dict[str, Any]) -> None:
    """The table."""
    steps, error = report["seconds_per_step"], report["relative_l2_to_fp32"]
    base = steps["bf16 eager"]["median"]
    table = Table(
        title=f"{report['arch']} {report['sample_shape']}, {report['machine']['threads']} threads"
    )
    for header in ("system", "s / step", "min - max", "x bf16 eager", "relative L2 to fp32"):
        table.add_column(header, justify="left" if header == "system" else "right")
    for name, t in steps.items():
        spread = f"{t['min']:.3f} - {t['max']:.3f}"
        table.add_row(
            name, f"{t['median']:.3f}", spread, f"{base / t['median']:.2f}", f"{error[name]:.4f}"
        )
    Console(width=100).print(table)
    c = report["compile"]
    print(
        f"compile: {c['seconds']:.1f} s with {c['calls']} calls, "
        f"{c['float_forwards_seconds']:.1f} s of float forwards; own overhead "
        f"{c['own_overhead_seconds']:.1f} s (cold cache, first step included)\n"
        f"peak memory {c['peak_memory_gib']:.2f} GiB = {c['peak_memory_over_fp32_weights']:.2f}x "
        f"the fp32 weights ({report['fp32_weights_gib']:.2f} GiB)\n"
        f"served by the one compile: {report['served_shapes']}"
    )


if __name__ == "__main__":
    main()
