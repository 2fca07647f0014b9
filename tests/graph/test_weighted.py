"""What has learned weights and no integer kernel is in the summary, and refused under strict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import FallbackError
from tests.passes.small import FLOAT32, Model, compiled, parameter

HEADS = "btc,chd->bthd"


@pytest.mark.filterwarnings("ignore:The tensor attributes self.model.o._flat_weights")
@pytest.mark.parametrize(
    ("reason", "model", "sizes"),
    [
        ("conv_transpose2d", Model(lambda m, x: m.o(x), o=nn.ConvTranspose2d(8, 8, 2, 2)),
         (8, 6, 6)),
        ("batch_norm", Model(lambda m, x: m.o(x), o=nn.BatchNorm2d(8)), (8, 6, 6)),
        ("prelu", Model(lambda m, x: m.o(x), o=nn.PReLU(8)), (8, 6, 6)),
        ("gru", Model(lambda m, x: m.o(x)[0], o=nn.GRU(8, 8, batch_first=True)), (6, 8)),
        ("einsum", Model(lambda m, x: torch.einsum(HEADS, x, m.w).flatten(2), w=parameter(8, 2, 4)),
         (6, 8)),
        ("lerp", Model(lambda m, x: torch.lerp(x, x * 2, m.w), w=parameter(8)), (6, 8)),
    ],
)  # fmt: skip
def test_it_is_named_with_its_reason(reason: str, model: Model, sizes: tuple[int, ...]) -> None:
    x = torch.randn(4, *sizes)
    served = compiled(model, x)
    assert [*served.summary.stayed_float] == [f"{reason} has no integer kernel"]
    with pytest.raises(FallbackError, match=f"{reason} has no integer kernel"):
        compiled(model, x, strict=True)


def test_keep_float_plans_it() -> None:
    model = Model(
        lambda m, x: m.up(m.a(x)), a=nn.Conv2d(8, 8, 1), up=nn.ConvTranspose2d(8, 8, 2, 2)
    )
    served = compiled(
        model, torch.randn(4, 8, 6, 6), FLOAT32.with_(keep_float=("up",)), strict=True
    )
    assert served.summary.stayed_float == {"recipe keeps up float": ("up",)}


def test_norms_biases_and_embedded_positions_are_not_listed() -> None:
    model = Model(lambda m, x: m.a(m.norm(x + m.places) * m.scale),
                  a=nn.Linear(8, 8), norm=nn.LayerNorm(8), places=parameter(6, 8),
                  scale=parameter(8))  # fmt: skip
    assert not compiled(model, torch.randn(4, 6, 8), strict=True).summary.stayed_float
