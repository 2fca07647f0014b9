"""What reconstruction costs: seconds an iteration for every kind of unit, and memory.

    python benchmarks/reconstruct.py --arch sd14                # the sd task's recipe, on the CPU
    python benchmarks/reconstruct.py --arch sd14 --device cuda  # all of it, not extrapolated

Random weights from the published configuration at full width: time and memory do not depend on
their values. On a CPU every unit takes a few iterations on a few samples; the whole recipe is
extrapolated from these, caching by the number of samples, training by the number of iterations. On
a GPU it runs in full.

Memory: two processes that differ in the budget of cached activations alone, a quarter of it and
all of it. What the second adds to the peak of the first while they reconstruct is what the budget
must bound; it is divided by the difference of the budgets. Both caches must fill theirs for that to
say something, so give it enough samples; how full they were is reported beside it.

Prints a table and writes benchmarks/results/reconstruct_ARCH_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import (
    ARCHES,
    GIB,
    RESULTS,
    arguments,
    ask_process,
    command_line,
    example,
    keep,
    machine,
    reset_peak,
    resident,
    show_table,
    unet_of,
)

TASKS = {"sd14": "sd", "sdxl": "sd", "ddpm": "cifar", "ldm": "bedroom"}
SMALL = 0.25  # the smaller budget, of the whole
FULL = 0.7  # of a budget, used at once: less says nothing about what the budget bounds


def main() -> None:
    """Both processes, the report."""
    parser = arguments(__doc__)
    parser.add_argument("--arch", choices=[*ARCHES], default="sd14")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, help="of the latents; the configuration's by default")
    parser.add_argument("--samples", type=int, default=16, help="rows on a CPU")
    parser.add_argument("--iters", type=int, default=3, help="of each unit on a CPU")
    parser.add_argument("--budget", type=float, default=1.0, help="GiB of cached activations")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(worker(options)))
        return
    small, big = (measured(options, share * options.budget) for share in (SMALL, 1.0))
    report = big | {
        "arch": options.arch,
        "device": options.device,
        "command": command_line(),
        "memory": {"small": small["memory"], "big": big["memory"]},
        "added_over_budget": added_over_budget(small["memory"], big["memory"]),
    }
    show(report)
    keep(f"reconstruct_{options.arch}_{options.device.partition(':')[0]}", report, options.results)


def added_over_budget(small: dict[str, float], big: dict[str, float]) -> float | None:
    """What a larger budget adds to the peak, over the difference; None if not filled."""
    if any(m["cached_gib"] < FULL * m["budget_gib"] for m in (small, big)):
        return None
    return (big["peak_gib"] - small["peak_gib"]) / (big["budget_gib"] - small["budget_gib"])


def measured(options: argparse.Namespace, budget: float) -> dict[str, Any]:
    """A process of its own."""
    command = ["--arch", options.arch, "--device", options.device, "--samples", options.samples]
    command += ["--iters", options.iters, "--worker", budget]
    command += ["--size", options.size] if options.size else []
    return dict(ask_process(__file__, *command))


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """Fake-quantise, reconstruct, say what it took."""
    import torch

    from fxquant.calibration.calls import read_calls
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
    with torch.device(options.device):
        unet = unet_of(options.arch).eval()
    batch = settings.batch
    calls = [example(unet, batch, options.size, seed=k) for k in range(-(-count // batch))]
    signature, flat = read_calls(calls, unet)
    quantised = fake_quantise(unet, signature, flat[:1], Options(recipe))
    tensors = tuple(torch.cat([c[k] for c in flat])[:count] for k in range(len(flat[0])))
    samples = Samples(tensors, torch.zeros(count, dtype=torch.int64))
    short = recipe if whole else recipe.with_(reconstruction={"iters": options.iters})
    assert short.reconstruction is not None
    reset_peak()  # of capturing and calibrating
    started = time.perf_counter()
    result = reconstruct(
        quantised.graph,
        quantised.table,
        samples,
        short.reconstruction,
        memory_budget=int(options.worker * GIB),
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
        "memory": {
            "budget_gib": options.worker,
            "cached_gib": result.cached_bytes / GIB,
            "peak_gib": resident("VmHWM") / GIB,
        },
        "machine": {**machine(), "gpu": gpu(options.device)},
    }


def gpu(device: str) -> str | None:
    """Its name, if there is one."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else None


def show(report: dict[str, Any]) -> None:
    """The table."""
    settings = report["recipe"]["reconstruction"]
    show_table(
        f"{report['arch']} on {report['device']}, batch {settings['batch']}, {report['rows']} rows",
        ("unit kind", "units", "s / iteration, mean"),
        [
            (kind, str(found["units"]), f"{found['seconds_per_iteration']:.3f}")
            for kind, found in report["by_kind"].items()
        ],
    )
    how = "extrapolated" if report["extrapolated"] else "measured"
    print(
        f"the whole recipe ({settings['samples']} samples, {settings['iters']} iterations a unit): "
        f"{report['whole_recipe_hours']:.2f} h, {how}"
    )
    for memory in report["memory"].values():
        print(
            f"peak memory {memory['peak_gib']:.2f} GiB with a budget of {memory['budget_gib']:.2f} "
            f"GiB ({memory['cached_gib']:.2f} GiB of it used at once)"
        )
    added = report["added_over_budget"]
    print(
        "a cache was not filled: more --samples"
        if added is None
        else f"added {added:.2f}x the budget"
    )


if __name__ == "__main__":
    main()
