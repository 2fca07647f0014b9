"""What compile reconstructs, what it cannot, and that it says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import LoaderError
from fxquant.recipe import Recipe
from fxquant.runtime.model import QuantizedModel
from tests.runtime import compiled as c
from tests.toy import relative_error

WIDTH = 16


class BasicTransformerBlock(nn.Module):
    """Attention to a context, with rotary embeddings that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rotary
        q, k = self.q(x), self.k(context)
        q = q * cos + q.flip(-1) * sin
        return x + self.o(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ k)


class Rotary(nn.Module):
    """Positions come as a table without a batch; learned tokens are expanded to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(BasicTransformerBlock() for _ in range(2))
        self.tokens = nn.Parameter(torch.randn(5, WIDTH))
        self.register_buffer("frequencies", torch.exp(-torch.arange(4.0)))

    def forward(self, sample: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        angles = (ids[..., None] * self.frequencies).flatten(1).repeat(1, 2)
        rotary = angles.cos(), angles.sin()
        x = self.embed(sample) + torch.cos(timestep)[:, None, None]
        context = self.tokens.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, context, rotary)
        return self.out(x)


class Positions(nn.Module):
    """A layer of what samples share, layers of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions, self.out = nn.Linear(8, 8), nn.Linear(10, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.embed(sample) + self.positions(ids.repeat(1, 5))))


class Noisy(nn.Module):
    """Adds noise of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(sample)
        return self.out(x + 0.1 * torch.randn_like(x))


def calls_with_ids(length: int = 6, batch: int = 3, **other: Any) -> list[c.Call]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.arange(length) // 3, torch.arange(length) % 3], 1).float()
    return [
        {
            "sample": torch.randn(batch, length, 8, generator=generator),
            "timestep": torch.full((batch,), t),
            "ids": ids,
            **other,
        }
        for t in (0.0, 300.0, 600.0, 900.0)
    ]


def recipe(loss: str = "fbr", iters: int = 40) -> Recipe:
    settings = {"iters": iters, "batch": 5, "loss": loss, "sampler": "uniform"}
    return c.float32("w4a8", keep_float=(), timestep_groups=2, reconstruction=settings)


def made(model: nn.Module, calls: list[c.Call], *args: Any, **options: Any) -> QuantizedModel:
    return c.compiled(model.eval(), calls, recipe(*args), **options)


@pytest.mark.parametrize("loss", ["fbr", "layer"])
def test_inputs_that_all_samples_share_are_no_obstacle(
    loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, calls = Rotary().eval(), calls_with_ids()
    quantised = made(model, calls, loss)
    trained = {unit.path.partition(":")[0] for unit in quantised.summary.units}
    assert {"embed", "out"} < trained
    assert any(path.startswith("blocks.0") for path in trained)
    assert "not reconstructed" not in caplog.text
    for call in (*calls, calls_with_ids(length=9, batch=2)[1]):  # ids are an input still
        assert relative_error(quantised(**call), model(**call).detach()) < 0.1
    losses = [(unit.loss_before, unit.loss_after) for unit in quantised.summary.units]
    assert sum(after < before for before, after in losses) > 1


def test_inputs_that_differ_without_a_row_for_each_sample_are_refused() -> None:
    torch.manual_seed(0)
    calls = calls_with_ids()
    calls[2]["ids"] = calls[2]["ids"] + 1
    with pytest.raises(LoaderError, match=r"ids has no row of its own .* nor is it the same"):
        made(Rotary(), calls)


def test_models_of_one_batch_size_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(LoaderError, match=r"takes batches of 3 only .*effort of 'fast'"):
        made(Rotary(), calls_with_ids(), dynamic=False)


@pytest.mark.parametrize("loss", ["fbr", "layer"])
def test_units_that_are_not_trained_are_named_once(
    loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    quantised = made(Positions(), calls_with_ids(), loss, 2)
    assert {unit.path for unit in quantised.summary.units} == {"embed", "out"}
    (said,) = [r.getMessage() for r in caplog.records if "not reconstructed" in r.getMessage()]
    assert "rounded to nearest: positions." in said


def test_random_numbers_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    calls = [{k: v for k, v in call.items() if k != "ids"} for call in calls_with_ids()]
    made(Noisy(), calls, "fbr", 2)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    (said,) = [r.getMessage() for r in warnings if "draws random numbers" in r.getMessage()]
    assert "randn_like" in said
    assert "different draws" in said
