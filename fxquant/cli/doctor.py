"""Show versions, CPU, compilers, GPU, caches, and the kernels that would be used here.

Ends with status 1 if an operator would run on the slow reference implementation.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxquant._version import __version__
from fxquant.cli.output import mib, show_json, show_table
from fxquant.graph.options import Options
from fxquant.kernels import jit, machine
from fxquant.kernels.cuda import build as cuda
from fxquant.kernels.cuda import nvcc
from fxquant.kernels.cuda.unit import ARCHES
from fxquant.kernels.cutlass import headers
from fxquant.kernels.dispatch import KERNELS, Config, TensorInfo, choose, missing

EXAMPLE = "fxquant doctor"

_PACKAGES = ("torch", "diffusers", "safetensors", "numpy", "transformers")
_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(options: argparse.Namespace) -> int:
    report = examine()
    if options.json:
        show_json(report)
    else:
        _show(report)
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything, as plain data."""
    here = machine.detect("cuda")
    kernels = would_use(here)
    return {
        "versions": _versions(),
        "cpu": _cpu(here),
        "compilers": {"C++": _compiler(), **_cuda_tools()},
        "gpu": _gpu(here),
        "GPU kernels": _gpu_kernels(here),
        "cache": _cache(),
        "compute dtype": str(Options(machine=here).compute_dtype).removeprefix("torch."),
        "kernels": kernels,
        "problems": _problems(kernels),
    }


def would_use(here: machine.Machine) -> list[dict[str, Any]]:
    """Kernel of each operator for an ordinary call: float32 in, 8-bit integers out."""
    rows = []
    for op in KERNELS:
        for bits in (8, 4) if op in ("linear", "conv2d") else (8,):
            chosen = choose(_ordinary(op, bits, here))
            slow = missing(chosen) if chosen.is_fallback else []
            other = [f"{k}: {w}" for k, w in slow]
            name = f"{op}, int{bits} weights" if op in ("linear", "conv2d") else op
            rows.append({"op": name, "kernel": chosen.kernel, "why_not": other})
    return rows


def _ordinary(op: str, weight_bits: int, here: machine.Machine) -> Config:
    layer = op in ("linear", "conv2d")
    names = {"cat_quantize": ("xs",), "add_quantize": ("a", "b"), "attention": ("q", "k", "v")}
    info = TensorInfo(torch.uint8 if layer else torch.float32, (None, 64, None, None))
    tensors = dict.fromkeys(names.get(op, ("x",)), info)
    options = {"weight_bits": weight_bits, "groups": 1, "activation": "none"}
    options |= {"dtype": torch.uint8, "out_dtype": torch.float32}
    return Config(op, tensors, options, here)


def _problems(kernels: list[dict[str, Any]]) -> list[str]:
    """One sentence for every reason to run slowly, with the operators it holds back."""
    held: dict[str, list[str]] = {}
    for row in kernels:
        for why in row["why_not"]:
            held.setdefault(why.partition(": ")[2], []).append(row["op"])
    return [f"{reason}: {', '.join(ops)} run on the slow reference" for reason, ops in held.items()]


def _versions() -> dict[str, str]:
    found = {"fxquant": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "system": platform.platform()}


def _cpu(here: machine.Machine) -> dict[str, str]:
    has = [name for name in _FEATURES if name in here.cpu_features]
    hidden = [n for n in _FEATURES if n in machine.cpu_features() and n not in has]
    level = os.environ.get("FXQUANT_CPU")
    return {
        "model": _cpu_model(),
        "architecture": here.arch,
        "features": ", ".join(has) or "none that matters here",
        **({"hidden by FXQUANT_CPU=" + level: ", ".join(hidden) or "nothing"} if level else {}),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _compiler() -> str:
    found = jit.find_compiler()
    return f"{found}: {_version_line(found)}" if found else jit.why_no_compiler()


def _cuda_tools() -> dict[str, str]:
    """What `fxquant kernels build --arch` needs."""
    compiler, folder = nvcc.find(), headers.find()
    tools = [found for tool in ("cuobjdump", "nvdisasm") if (found := nvcc.find_tool(tool))]
    return {
        "nvcc": f"{compiler}: {_version_line(compiler)}" if compiler else nvcc.why_not_found(),
        "CUTLASS": f"{folder}: {headers.version(folder)}" if folder else headers.why_not_found(),
        "cuobjdump": ", ".join(tools) if len(tools) == 2 else nvcc.why_no_tools(),
    }


def _version_line(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    lines = (line for line in said.stdout.splitlines() if re.search(r"\d\.\d", line))
    return next(lines, "it tells no version")


def _gpu(here: machine.Machine) -> str:
    if here.cuda is None:
        return "none that this build of PyTorch can use"
    return f"{torch.cuda.get_device_name()}, compute capability {here.cuda}"


def _gpu_kernels(here: machine.Machine) -> dict[str, str]:
    """How much is built for each architecture that has anything, and for this GPU's."""
    built = Counter(build.arch for build in cuda.built())
    mine = cuda.to_build(here.cuda) if here.cuda else ()
    return {
        arch: f"{built[arch]} of {len(cuda.selected(arch))} built"
        + (f"; {cuda.command(here.cuda)}" if arch in mine and here.cuda and not built[arch] else "")
        for arch in ARCHES
        if built[arch] or arch in mine
    }


def _cache() -> dict[str, str]:
    folder, builds = jit.cache_dir(), jit.builds()
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    sound = sum(b.sound for b in builds)
    return {
        "folder": str(folder),
        "writable": "yes"
        if os.access(there, os.W_OK)
        else "no: kernels cannot be kept; set FXQUANT_CACHE to a folder you may write to",
        "builds": f"{len(builds)} ({sound} sound), {mib(sum(b.bytes for b in builds))}",
    }


def _show(report: Mapping[str, Any]) -> None:
    for part in ("versions", "cpu", "compilers", "cache"):
        show_table(part, ("", ""), list(report[part].items()), left=2)
    print(f"gpu: {report['gpu']}")
    for arch, state in report["GPU kernels"].items():
        print(f"GPU kernels for {arch}: {state}")
    print(f"float parts compute in {report['compute dtype']}")
    rows = [(r["op"], r["kernel"], "; ".join(r["why_not"]) or "-") for r in report["kernels"]]
    show_table("kernels that would be used", ("operator", "kernel", "why not a faster"), rows, 3)
    for problem in report["problems"]:
        print(f"slow: {problem}")
    if not report["problems"]:
        print("every operator has a native kernel here")
