"""How much 8 bit rounding moves a module's result, found without fxquant.

Under this mode every product (convolution, matrix multiplication, attention) gets operands that are
off by up to half a step of 8 bits, the range being that of the whole tensor: what an honest
quantisation does to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.toy import relative_error

_WORDS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "attention", "conv", "linear", "gru")


class _Noise(TorchDispatchMode):
    def __init__(self, seed: int):
        super().__init__()
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if any(word in name for word in _WORDS):
            args = tuple(self._rounded(a) for a in args)
        return func(*args, **(kwargs or {}))

    def _rounded(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            return value
        finite = value[torch.isfinite(value)]
        if not finite.numel():
            return value
        step = float(finite.max() - finite.min()) / 255
        noise = torch.rand(value.shape, generator=self._generator) - 0.5
        return value + (noise * step).to(value.dtype)


def noisy(run: Callable[[], Tensor], wanted: Tensor, times: int = 3) -> float:
    """The largest relative error of `run` under noise."""
    errors = []
    for seed in range(times):
        with _Noise(seed):
            errors.append(relative_error(run(), wanted))
    return max(errors)
