"""Draws follow the memory order that the model has, whatever the kernels make of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from tests.passes.small import Model
from tests.toy import golden, relative_error, story


def noisy(between: Callable[[Tensor], Tensor]) -> Model:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    return Model(lambda m, x: between(m.conv(x)), conv=conv)


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h + torch.randn_like(h),
        lambda h: h.flatten(2).mT + torch.randn_like(h.flatten(2).mT),
        lambda h: h + torch.rand_like(h.permute(2, 0, 3, 1)).permute(1, 3, 0, 2),
    ],
    ids=["image", "tokens", "permuted"],
)
def test_the_numbers_are_those_of_the_module(between: Callable[[Tensor], Tensor]) -> None:
    model = noisy(between).eval()
    served = fxquant.compile(model, [(torch.randn(2, 4, 8, 8),)] * 2, progress=False)
    for batch in (2, 3):
        x = torch.randn(batch, 4, 8, 8)
        for _ in range(4):
            results = []
            for one in (served, model):
                torch.manual_seed(3)
                with torch.no_grad():
                    results.append(one(x))
            assert relative_error(*results) < 0.05


def test_golden() -> None:
    model = noisy(lambda h: h + torch.randn_like(h))
    gm = capture(model.eval(), (torch.randn(2, 4, 8, 8),)).graph_module
    golden(__file__, run(pipelines.PREPARE, gm, story().options, stop_after="pin_draws"))
