"""How much 8 bit rounding moves a module's result, found without fxquant.

Under this mode every product (convolution, matrix multiplication, attention) gets operands that are
off by up to half a step of 8 bits, the range being that of the whole tensor: what an honest
quantisation does to it. Honest, it also clips what exceeds the range that the same operand had in
the calibration calls, which few calls of few values teach badly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.toy import relative_error

_WORDS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "attention", "conv", "linear", "gru")


Range = tuple[float, float]


class _Products(TorchDispatchMode):
    """Sees every operand of every product, by the product's number and its own."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if any(word in name for word in _WORDS):
            self._count += 1
            args = tuple(
                self._operand(f"{name} {self._count} {k}", value) if _is_operand(value) else value
                for k, value in enumerate(args)
            )
        return func(*args, **(kwargs or {}))

    def _operand(self, key: str, value: Tensor) -> Tensor:
        raise NotImplementedError


def _is_operand(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _range(value: Tensor) -> Range:
    finite = value[torch.isfinite(value)]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)


class _Ranges(_Products):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Range] = {}

    def _operand(self, key: str, value: Tensor) -> Tensor:
        low, high = _range(value)
        seen = self.seen.get(key, (low, high))
        self.seen[key] = (min(low, seen[0]), max(high, seen[1]))
        return value


class _Noise(_Products):
    def __init__(self, ranges: dict[str, Range], seed: int) -> None:
        super().__init__()
        self._ranges = ranges
        self._generator = torch.Generator().manual_seed(seed)

    def _operand(self, key: str, value: Tensor) -> Tensor:
        low, high = self._ranges.get(key) or _range(value)
        noise = (torch.rand(value.shape, generator=self._generator) - 0.5) * (high - low) / 255
        clipped = torch.where(torch.isfinite(value), value.clamp(low, high), value)
        return clipped + noise.to(value.dtype)


def ranges_of(runs: Iterable[Callable[[], Any]]) -> dict[str, Range]:
    """What every operand of every product ranges over in these runs."""
    seen: dict[str, Range] = {}
    for run in runs:
        with _Ranges() as mode:
            mode.seen = seen
            run()
    return seen


def noisy(
    run: Callable[[], Tensor], wanted: Tensor, ranges: dict[str, Range], times: int = 3
) -> float:
    """The largest relative error of `run` under noise."""
    errors = []
    for seed in range(times):
        with _Noise(ranges, seed):
            errors.append(relative_error(run(), wanted))
    return max(errors)
