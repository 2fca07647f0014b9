"""Errors about sizes name the sizes: which those are, only a model that has served others knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxquant.errors import CallError
from fxquant.graph.results import Result

_MOST = 4096


class ServedSizes:
    """The sizes of the calls that were served."""

    def __init__(self) -> None:
        self._served: set[tuple[torch.Size, ...]] = set()

    def run(
        self, step: Callable[[], Result], names: Sequence[str], tensors: Sequence[Tensor]
    ) -> Result:
        """``step()`` of a call with these tensors.

        Raises:
            CallError: torch refused it, and no call with these sizes was served before. What else
                is raised, memory that ran out, say, is no matter of sizes.
        """
        if torch.compiler.is_compiling():  # sizes are symbols
            return step()
        sizes = tuple(tensor.shape for tensor in tensors)
        try:
            result = step()
        except RuntimeError as error:
            if type(error) is not RuntimeError or not self._is_new(sizes):
                raise
            said = ", ".join(f"{n} {list(s)}" for n, s in zip(names, sizes, strict=True))
            raise CallError(
                "the model does not take these sizes, which it was not called with before: "
                f"{said}. Inside it torch says: {error}"
            ) from error
        if len(self._served) < _MOST:
            self._served.add(sizes)
        return result

    def _is_new(self, sizes: tuple[torch.Size, ...]) -> bool:
        return sizes not in self._served and len(self._served) < _MOST
