"""What a graph returns: its module's one tensor, or a tuple of several (a ControlNet's residuals, a
video and its sound), in the order in which they lie in what the module returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]


def parts(result: Any) -> tuple[Any, ...]:
    """The tensors of a result, or the nodes of an output."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def result_of(tensors: list[Any]) -> Any:
    """Inverse of `parts`."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def mapped(function: Callable[..., Tensor], *results: Result) -> Result:
    """The function of each tensor; of several results, of those in the same place."""
    made: Result = result_of([function(*each) for each in zip(*map(parts, results), strict=True)])
    return made


def joined(result: Result) -> Tensor:
    """All numbers of a result in one tensor, for errors; of a single tensor, itself."""
    found = parts(result)
    return found[0] if len(found) == 1 else torch.cat([t.reshape(-1).float() for t in found])
