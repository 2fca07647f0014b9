"""What a pass may read besides the graph: one frozen record, the same for every pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fxquant.kernels.machine import Machine, detect
from fxquant.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """Pass options.

    Attributes:
        recipe: what the user chose.
        machine: the machine to lower for; not necessarily this one. By default this one, without
            its GPUs: a graph for one of them wants `detect` of that device.
        backend: "auto" or one kernel family; see fxquant.kernels.dispatch.
        device: the type of device that the graph runs on, "cpu" or "cuda".
        progress: a slow pass may show a progress bar.
    """

    recipe: Recipe = field(default_factory=Recipe)
    machine: Machine = field(default_factory=lambda: detect("cpu"))
    backend: str = "auto"
    device: str = "cpu"
    progress: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the parts that stay float, in lowered graphs."""
        if self.recipe.compute_dtype != "auto":
            return getattr(torch, self.recipe.compute_dtype)
        if self.device == "cuda":
            return torch.float16
        return torch.bfloat16 if "avx512_bf16" in self.machine.cpu_features else torch.float32

    @property
    def storage_dtype(self) -> torch.dtype:
        """How activation integers q are kept in memory: CPUs multiply unsigned by signed bytes,
        and get q + 128; GPUs multiply signed ones."""
        return torch.int8 if self.device == "cuda" else torch.uint8
