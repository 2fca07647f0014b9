"""What reconstruction costs: seconds an iteration for every kind of unit, and memory.

    python benchmarks/reconstruct.py --arch sd14                # the sd task's recipe, on the CPU
    python benchmarks/reconstruct.py --arch sd14 --device cuda  # all of it, not extrapolated

Random weights from the published configuration at full width: time and memory do not depend on
their values. On a CPU every unit takes a few iterations on a few samples; the whole recipe is
extrapolated from these, caching by the number of samples, training by the number of iterations. On
a GPU it runs in full.

Memory: one process holds no cached activation in memory (a budget of a byte), one holds a budget
that it fills. What the second adds to the peak is what the budget must bound.

Prints a table and writes benchmarks/results/reconstruct_ARCH_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "tests" / "configs"
ARCHES = {"sd14": "sd14", "sdxl": "sdxl_base", "ddpm": "ddpm_cifar10_32", "ldm": "ldm_celebahq_256"}
TASKS = {"sd14": "sd", "sdxl": "sd", "ddpm": "cifar", "ldm": "bedroom"}


def main() -> None:
    """Both processes, the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", choices=[*ARCHES], default="sd14")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, help="of the latents; the configuration's by default")
    parser.add_argument("--samples", type=int, default=4, help="rows on a CPU")
    parser.add_argument("--iters", type=int, default=3, help="of each unit on a CPU")
    parser.add_argument("--budget", type=float, default=0.4, help="GiB of cached activations")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(worker(options)))
        return
    held = measured(options, options.budget)
    empty = measured(options, 0.0)
    report = {
        "arch": options.arch,
        "device": options.device,
        "recipe": held["recipe"],
        "rows": held["rows"],
        "by_kind": held["by_kind"],
        "units": held["units"],
        "seconds": held["seconds"],
        "whole_recipe_hours": held["whole_recipe_hours"],
        "extrapolated": held["extrapolated"],
        "budget_gib": options.budget,
        "cached_gib": held["cached_gib"],
        "peak_gib": {"empty": empty["peak_gib"], "held": held["peak_gib"]},
        "added_over_budget": (held["peak_gib"] - empty["peak_gib"]) / options.budget,
        "machine": held["machine"],
    }
    show(report)
    name = f"reconstruct_{options.arch}_{options.device.partition(':')[0]}.json"
    (HERE / "results" / name).write_text(json.dumps(report, indent=1) + "\n")


def measured(options: argparse.Namespace, budget: float) -> dict[str, Any]:
    """A process of its own."""
    command = [sys.executable, __file__, "--arch", options.arch, "--device", options.device]
    command += ["--samples", str(options.samples), "--iters", str(options.iters)]
    command += ["--worker", str(budget)]
    command += ["--size", str(options.size)] if options.size else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """Fake-quantise, reconstruct, say what it took."""
    import diffusers
    import torch

    from fxquant.calibration.calls import read_calls
    from fxquant.calibration.example import example_call
    from fxquant.compiler import fake_quantise
    from fxquant.graph.options import Options
    from fxquant.presets import TASKS as PUBLISHED
    from fxquant.recipe import Recipe
    from fxquant.reconstruction.reconstruct import reconstruct
    from fxquant.reconstruction.stream import Samples

    task = TASKS[options.arch]
    recipe = Recipe.parse("w4a8-best", task=task).with_(
        weight_observer="absmax"
    )  # faster, and as good here
    settings = recipe.reconstruction
    assert settings is not None
    rows = settings.samples * (2 if task == "sd" else 1)  # guided: two rows a sample
    whole = options.device != "cpu"
    count = rows if whole else options.samples
    config = json.loads((CONFIGS / f"{ARCHES[options.arch]}.json").read_text())
    with torch.device(options.device):
        unet = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    batch = settings.batch
    sides = {"size": options.size} if options.size else {}
    calls = [example_call(unet, batch=batch, seed=k, **sides) for k in range(-(-count // batch))]
    signature, flat = read_calls(calls, unet)
    quantised = fake_quantise(unet, signature, flat[:1], Options(recipe))
    tensors = tuple(torch.cat([c[k] for c in flat])[:count] for k in range(len(flat[0])))
    samples = Samples(tensors, torch.zeros(count, dtype=torch.int64))
    short = recipe if whole else recipe.with_(reconstruction={"iters": options.iters})
    assert short.reconstruction is not None
    started = time.perf_counter()
    result = reconstruct(
        quantised.graph,
        quantised.table,
        samples,
        short.reconstruction,
        memory_budget=max(1, int(options.worker * 2**30)),
        show=True,
    )
    seconds = time.perf_counter() - started
    training = sum(u.seconds for u in result.units)
    caching = (seconds - training) * (rows / count)
    total = seconds if whole else caching + training / options.iters * PUBLISHED[task].iters
    kinds: dict[str, list[float]] = defaultdict(list)
    for u in result.units:
        kinds[u.kind].append(u.seconds / max(1, u.iters))
    return {
        "recipe": recipe.to_json(),
        "rows": count,
        "units": [[u.path, u.kind, u.seconds / max(1, u.iters)] for u in result.units],
        "by_kind": {
            kind: {"units": len(v), "seconds_per_iteration": sum(v) / len(v)}
            for kind, v in kinds.items()
        },
        "seconds": {"measured": seconds, "training": training, "caching_all_rows": caching},
        "whole_recipe_hours": total / 3600,
        "extrapolated": not whole,
        "cached_gib": result.cached_bytes / 2**30,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "machine": machine(torch, diffusers, options.device),
    }


def machine(torch: Any, diffusers: Any, device: str) -> dict[str, Any]:
    """Where and with what this ran."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x for x in info if x.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "cpu": model.partition(":")[2].strip(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def show(report: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    settings = report["recipe"]["reconstruction"]
    table = Table(
        title=f"{report['arch']} on {report['device']}, batch {settings['batch']}, "
        f"{report['rows']} rows"
    )
    for header in ("unit kind", "units", "s / iteration, mean"):
        table.add_column(header, justify="left" if header == "unit kind" else "right")
    for kind, found in report["by_kind"].items():
        table.add_row(kind, str(found["units"]), f"{found['seconds_per_iteration']:.3f}")
    Console(width=100).print(table)
    how = "extrapolated" if report["extrapolated"] else "measured"
    peak = report["peak_gib"]
    print(
        f"the whole recipe ({settings['samples']} samples, {settings['iters']} iterations a unit): "
        f"{report['whole_recipe_hours']:.2f} h, {how}\n"
        f"peak memory {peak['empty']:.2f} GiB with nothing cached in memory, {peak['held']:.2f} "
        f"GiB with a budget of {report['budget_gib']:.2f} GiB ({report['cached_gib']:.2f} GiB of "
        f"it used at once): {report['added_over_budget']:.2f}x the budget added"
    )


if __name__ == "__main__":
    main()
