"""Time a step of a compiled model against the float model, and account for size and operations.

The models take turns and medians are shown. Inputs are random, which does not change speed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from fxquant.calibration.example import example_call
from fxquant.cli.inputs import positive
from fxquant.cli.output import mib, show_json, show_table
from fxquant.cli.pair import add_pair_arguments, compiled_of, reference_of
from fxquant.evaluate.accounting import (
    bit_operations,
    float_bit_operations,
    peak_memory,
    size_by_part,
)
from fxquant.evaluate.figures import output
from fxquant.evaluate.profile import Timing, interleaved, time_by_kind
from fxquant.runtime.model import QuantizedModel
from fxquant.runtime.summary import size_in_bytes

EXAMPLE = "fxquant bench digits --batch 64 --profile"


def configure(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    parser.add_argument("--batch", type=positive, default=2, help="default %(default)s")
    parser.add_argument(
        "--size", type=positive, help="height and width, default the config's sample_size"
    )
    parser.add_argument(
        "--rounds", type=positive, default=10, help="timed turns of each, default %(default)s"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also print the time of each kind of operator"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(options: argparse.Namespace) -> int:
    reference = reference_of(options)
    model = reference if reference is not None else compiled_of(options, None).compiled
    call = example_call(model, options.batch, options.size)
    pair = compiled_of(options, reference, [call])
    report = measure(pair.compiled, reference, call, options.rounds)
    if options.profile:
        tensors = pair.compiled.signature.flatten((), call)
        times = time_by_kind(pair.compiled, tensors, options.rounds, show=True)
        report["profile"] = [asdict(t) for t in times]
    if options.json:
        show_json(report)
    else:
        _show(report)
    return 0


def measure(
    compiled: QuantizedModel, reference: nn.Module | None, call: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Time, weights and memory of each system, and the compiled one's size and operations."""
    systems = _systems(compiled, reference, call)
    timings = interleaved({name: step for name, (_, step) in systems.items()}, rounds, show=True)
    operations = bit_operations(compiled, compiled.signature.flatten((), call))
    return {
        "recipe": compiled.recipe.name,
        "sample": list(call["sample"].shape),
        "threads": torch.get_num_threads(),
        "systems": [
            _system(name, model, step, timings[name]) for name, (model, step) in systems.items()
        ],
        "size": size_by_part(compiled),
        "operations": [asdict(o) for o in operations],
        "bit_operations": sum(o.bit_operations for o in operations),
        "float_bit_operations": float_bit_operations(operations),
    }


_System = tuple[nn.Module, Callable[[], object]]


def _systems(
    compiled: QuantizedModel, reference: nn.Module | None, call: dict[str, Any]
) -> dict[str, _System]:
    models: dict[str, nn.Module] = {}
    if isinstance(reference, QuantizedModel):
        models["against"] = reference
    elif reference is not None:
        models = {"float32": reference, "bfloat16": _bfloat16(reference)}
    models[compiled.recipe.name] = compiled
    return {name: (model, _step(model, call)) for name, model in models.items()}


def _bfloat16(model: nn.Module) -> nn.Module:
    return nn.Module.to(copy.deepcopy(model), torch.bfloat16)  # diffusers' own `to` only warns more


def _step(model: nn.Module, call: dict[str, Any]) -> Callable[[], object]:
    cast = {k: _cast(v, model) for k, v in call.items()}
    return lambda: output(model, cast)


def _cast(value: Any, model: nn.Module) -> Any:
    if isinstance(value, dict):
        return {k: _cast(v, model) for k, v in value.items()}
    return value.to(model.dtype) if value.is_floating_point() else value


def _system(
    name: str, model: nn.Module, step: Callable[[], object], timing: Timing
) -> dict[str, Any]:
    memory = peak_memory(step)
    return {
        "name": name,
        "seconds": asdict(timing),
        "weights": size_in_bytes(model),
        "call_memory": memory and asdict(memory),
    }


def _show(report: dict[str, Any]) -> None:
    systems, sizes = report["systems"], report["size"]
    first = systems[0]["seconds"]["median"]
    show_table(
        f"one step, sample {report['sample']}, {report['threads']} threads",
        ("", "ms, median", "min - max", "speed-up", "weights", "memory of a call"),
        [_row(s, first) for s in systems],
    )
    if systems[0]["call_memory"]:
        print(f"memory of a call: above the weights, {systems[0]['call_memory']['how']}\n")
    total = sum(sizes.values())
    show_table(
        f"size of {report['recipe']}",
        ("part", "size", "share"),
        [(part, mib(size), f"{100 * size / total:.1f} %") for part, size in sizes.items()],
    )
    whole, floats = report["bit_operations"], report["float_bit_operations"]
    show_table(
        "bit operations of the step: MACs x weight bits x activation bits",
        ("", "MACs", "bit operations", "of float32's"),
        [
            *map(_operations, report["operations"]),
            ("all", "", f"{whole / 1e9:.2f} G", f"{whole / floats:.3f}"),
        ],
    )
    if "profile" in report:
        _show_profile(report["profile"])


def _row(system: dict[str, Any], first: float) -> tuple[str, ...]:
    t, memory = system["seconds"], system["call_memory"]
    return (
        system["name"],
        f"{1e3 * t['median']:.2f}",
        f"{1e3 * t['low']:.2f} - {1e3 * t['high']:.2f}",
        f"{first / t['median']:.2f}x",
        mib(system["weights"]),
        mib(memory["bytes"]) if memory else "-",
    )


def _operations(row: dict[str, Any]) -> tuple[str, ...]:
    share = row["bit_operations"] / (row["macs"] * 32**2)
    return (
        f"{row['kind']}, {row['precision']}",
        f"{row['macs'] / 1e6:.1f} M",
        f"{row['bit_operations'] / 1e9:.2f} G",
        f"{share:.3f}",
    )


def _show_profile(rows: list[dict[str, Any]]) -> None:
    total = sum(r["seconds"] for r in rows)
    show_table(
        f"time by kind of operator, {1e3 * total:.2f} ms together (run one by one)",
        ("", "nodes", "ms", "share"),
        [
            (
                r["kind"],
                str(r["calls"]),
                f"{1e3 * r['seconds']:.3f}",
                f"{100 * r['seconds'] / total:.1f} %",
            )
            for r in rows
        ],
    )
