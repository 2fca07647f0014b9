"""What the GPU benchmarks share: is there a GPU, and which."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from common import machine


def need_gpu() -> None:
    """Say so and exit with 2 where there is none."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU: this measures on one, and PyTorch can use none here", file=sys.stderr)
        raise SystemExit(2)


def gpu() -> dict[str, Any]:
    """Where, when and with what this ran."""
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **machine(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()
