"""What the benchmarks share: models and inputs, clocks, memory, results, processes that measure.

Nothing here imports torch before a function needs it: a process that serves another runtime's model
must not hold torch in its memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    import torch
    from torch import nn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CONFIGS = HERE.parent / "tests" / "configs"
ARCHES = {"sd14": "sd14", "sdxl": "sdxl_base", "ddpm": "ddpm_cifar10_32", "ldm": "ldm_celebahq_256"}
GIB = 2**30
_SOURCES = ("fxquant", "passes", "kernels")
_TOOLS = ("torch", "diffusers", "openvino", "nncf", "torchao", "onnxruntime")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring as it is."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def step_arguments(doc: str | None, rounds: int, calls: int) -> argparse.ArgumentParser:
    """A parser with what every comparison of systems' steps takes.

    Args:
        rounds, calls: the defaults.
    """
    parser = arguments(doc)
    parser.add_argument("--arch", choices=[*ARCHES, "digits"], default="sd14")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--calls", type=int, default=calls, help="calibration calls")
    parser.add_argument("--memory", type=float, default=20.0, help="GiB for all systems together")
    parser.add_argument("--folder", type=Path, help="keep what is prepared here, and reuse it")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return parser


# Models and inputs


def build(arch: str) -> nn.Module:
    """The float32 model in eval mode, channels_last; the same weights every time."""
    import torch

    if arch == "digits":
        from fxquant import assets

        return assets.load_digits_unet()
    torch.manual_seed(0)
    return unet_of(arch).eval().to(memory_format=torch.channels_last)


def unet_of(arch: str) -> Any:
    """The model of a published configuration, random weights."""
    import diffusers

    config = json.loads((CONFIGS / f"{ARCHES[arch]}.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_config(config)


def outline(arch: str) -> tuple[nn.Module, int]:
    """A module with the model's configuration and hardly a weight, and the bytes of all weights."""
    import torch

    with torch.device("cpu" if arch == "digits" else "meta"):
        model: Any = build(arch) if arch == "digits" else unet_of(arch)
    stand_in: Any = torch.nn.Linear(1, 1)
    stand_in.config = model.config
    return stand_in, 4 * sum(p.numel() for p in model.parameters())


def example(model: Any, batch: int, size: int | None, seed: int) -> dict[str, Any]:
    """A call of the model; the same for one seed in every process."""
    from fxquant.calibration.example import example_call

    return example_call(model, batch=batch, size=size, seed=seed)


def oblong(call: dict[str, Any], ratio: tuple[int, int]) -> dict[str, Any]:
    """The call with another aspect: (6, 10) makes 48x80 of 64x64."""
    import torch

    batch, channels, side, _ = call["sample"].shape
    high, wide = (side * part // 8 for part in ratio)
    return call | {"sample": torch.randn(batch, channels, high, wide)}


def as_dtype(call: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a call in another dtype."""
    if isinstance(call, dict):
        return {k: as_dtype(v, dtype) for k, v in call.items()}
    return call.to(dtype) if call.is_floating_point() else call


def run(model: Any, call: dict[str, Any]) -> torch.Tensor:
    """The model's result on one call."""
    import torch

    with torch.no_grad():
        return model(**call, return_dict=False)[0]


# Clocks and memory


def kernel_options(doc: str | None) -> argparse.Namespace:
    """What a script takes that times kernels in its own process, with the threads already set."""
    import torch

    parser = arguments(doc)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def keep_shapes(name: str, shapes: Any, options: argparse.Namespace) -> None:
    """Write what was measured shape by shape under `kernel_options`."""
    report = {
        "machine": {**machine(), "threads": options.threads},
        "command": command_line(),
        "rounds": options.rounds,
        "shapes": shapes,
    }
    keep(name, report, options.results)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """(result, wall seconds)."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def resident(what: str = "VmRSS", pid: int | str = "self") -> int:
    """Bytes of a process in memory, or the most there ever were (VmHWM); 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{what}:")), 0)


def resident_of_group(group: int) -> int:
    """Bytes in memory of all processes of a group."""
    return sum(resident(pid=int(p.name)) for p in Path("/proc").glob("[0-9]*") if _in(group, p))


def _in(group: int, process: Path) -> bool:
    try:
        return os.getpgid(int(process.name)) == group
    except ProcessLookupError:
        return False


def reset_peak() -> None:
    """VmHWM starts again from what is resident now, less what the allocator had not given back."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


# Where it ran, what came of it


def machine() -> dict[str, Any]:
    """Where and with what this ran."""
    import torch

    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x for x in info if x.startswith("model name")), "")
    return {
        "cpu": model.partition(":")[2].strip() or platform.processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{tool: version for tool in _TOOLS if (version := installed(tool))},
    }


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest_of_sources() -> str:
    """Changes when anything in fxquant does."""
    files = (f for part in _SOURCES for f in sorted((HERE.parent / part).rglob("*.*")))
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def command_line() -> str:
    """The command that was run, to be kept beside what it measured: without where this machine has
    its files."""
    words = [_placeless(word) for word in sys.argv[1:]]
    return shlex.join(["python", os.path.relpath(sys.argv[0], HERE.parent), *words])


def _placeless(word: str) -> str:
    """A path's last part; --option=path keeps its option."""
    option, equals, value = word.rpartition("=")
    return option + equals + Path(value).name if os.sep in value else word


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def keep(name: str, value: Any, folder: Path = RESULTS) -> None:
    """A result as JSON, by default beside the others."""
    write_json(folder / f"{name}.json", value)
    print(f"wrote {os.path.relpath(folder / name)}.json")


def show_table(title: str, headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table; all columns but the first to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


# Processes


@contextmanager
def folder_or_temporary(folder: Path | None) -> Iterator[Path]:
    """The folder, made if need be, or one that goes away again."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fxquant-bench-") as temporary:
        yield Path(temporary)


def ask_process(script: str, *args: object) -> Any:
    """What a process of its own found out: the JSON in the last line that it prints."""
    command = [sys.executable, script, *map(str, args)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
