"""What a kernel is, and what it is asked when it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels.machine import Machine

MOST_PRODUCTS = 2**31 // (255 * 128)
"""How many products of an unsigned and a signed byte int32 can sum."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of one tensor argument; a dynamic size is None."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Config:
    """One call of an op, as far as it is known before it runs.

    ``tensors`` holds the tensor arguments that are present, ``options`` the other arguments, both
    under their names in the op's schema. A list of tensors appears under its own name, once, as
    its first element.
    """

    op: str
    tensors: Mapping[str, TensorInfo]
    options: Mapping[str, Any]
    machine: Machine
    device: str = "cpu"
    """The type of device that the tensors are on: ``cpu`` or ``cuda``."""

    @property
    def products(self) -> int:
        """How many an output of a layer sums, as far as its weight is known."""
        weight = self.tensors.get("weight")
        sizes = weight.shape[1:] if weight else ()
        return prod(size or 1 for size in sizes) * (1 if self.options["weight_bits"] > 4 else 2)


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op.

    ``why_not`` answers None when the kernel can run a config, else a sentence that says why not.
    ``run`` takes the op's arguments without the last one, ``kernel``. A fallback serves where no
    kernel of the device's own does.
    """

    name: str
    op: str
    backend: str
    why_not: Callable[[Config], str | None] = field(compare=False)
    run: Callable[..., Tensor] = field(compare=False)
    is_fallback: bool = False
    is_repeatable: bool = False
    """All its work is done by PyTorch's operators and through `calls.call`, and none of it depends
    on numbers read out of tensors: so its calls can be written down, and repeated on other ones."""
