"""A compiled model as torch.export takes it: under another name than `graph`, which an exported
program keeps for its own."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def exportable(model: Any) -> nn.Module:
    """A module that holds `model` and has the signature of its forward."""

    def forward(self: _Exportable, *args: Any, **kwargs: Any) -> Any:
        return self.model.serve(*args, **kwargs)  # type: ignore[operator]

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    return type("Exportable", (_Exportable,), {"forward": forward})(model)


class _Exportable(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
