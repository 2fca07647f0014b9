"""Ten-line models: prepared, compiled and served, and compared with themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from fxquant.runtime.model import QuantizedModel
from tests.toy import relative_error, story

FLOAT32 = Recipe.parse("w8a8-fast").with_(compute_dtype="float32")


class Model(nn.Module):
    """Parameters by name, and what is done with them and the inputs."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def parameter(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes) / sizes[0] ** 0.5)


def prepared(model: nn.Module, x: Tensor) -> GraphModule:
    """The float graph that is quantised, which computes what the model does."""
    gm = run(pipelines.PREPARE, capture(model.eval(), (x,)).graph_module, story().options)
    with torch.no_grad():
        for sample in (x, x[:1], torch.cat([x, x + 1])):
            assert relative_error(gm(sample), model(sample)) < 1e-5
    return gm


def compiled(model: nn.Module, x: Tensor, recipe: Recipe = FLOAT32, **options: Any):
    """Compiled on random calls, and near the model on others, in batches of 4 and 1."""
    calls = [(torch.randn_like(x),) for _ in range(4)]
    served = fxquant.compile(model.eval(), calls, recipe, progress=False, **options)
    assert_near(served, model, x, most=0.1)
    return served


def assert_near(served: QuantizedModel, model: nn.Module, x: Tensor, most: float = 0.05) -> None:
    with torch.no_grad():
        for sample in (x, x[:1], x, x[:3], x):
            assert relative_error(served(sample), model(sample)) < most
