"""Which values belong to the samples of a call, and which to all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.graph.nodes import aten, calls
from fxquant.graph.samples import has_samples


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_tokens, self.of_table = nn.Linear(16, 16), nn.Linear(2, 16)

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        return self.of_tokens(tokens) + self.of_table(table)


def test_a_table_has_none_though_its_length_divides_by_the_batch() -> None:
    gm = capture(Positions(), (torch.randn(2, 6, 16), torch.randn(6, 2))).graph_module
    assert [has_samples(n) for n in calls(gm, aten.linear.default)] == [True, False]


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(timestep[:, None] * torch.ones(8))


def test_timesteps_have_samples_though_they_never_meet_the_sample() -> None:
    gm = capture(Apart(), (torch.randn(2, 4, 8, 8), torch.rand(2))).graph_module
    assert [has_samples(n) for n in calls(gm, aten.linear.default)] == [True]
