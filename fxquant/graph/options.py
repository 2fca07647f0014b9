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
        machine: the machine to lower for; not necessarily this one.
        backend: "auto" or one kernel family; see fxquant.kernels.dispatch.
        progress: a slow pass may show a progress bar.
    """

    recipe: Recipe = field(default_factory=Recipe)
    machine: Machine = field(default_factory=detect)
    backend: str = "auto"
    progress: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the parts that stay float, in lowered graphs."""
        if self.recipe.compute_dtype != "auto":
            return getattr(torch, self.recipe.compute_dtype)
        return torch.bfloat16 if "avx512_bf16" in self.machine.cpu_features else torch.float32

    @property
    def storage_dtype(self) -> torch.dtype:
        """How activation integers are kept in memory: q + 128 as uint8, which oneDNN requires."""
        return torch.uint8
