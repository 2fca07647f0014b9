"""functionalize replaces in-place operators, and later readers see the new value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import PassError
from fxquant.graph.capture import capture
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from tests.toy import golden, story, targets


class InPlace(nn.Module):
    """Writes into a constant and into a value that is read again."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        kernel = torch.outer(torch.arange(4.0), torch.arange(4.0))
        kernel /= kernel.sum()
        x = sample * 2
        y = x + 1
        x.mul_(3)
        return x + y + kernel


class WritesIntoAView(nn.Module):
    """The write changes `sample * 2` through its reshaped view."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x = sample * 2
        x.view(-1).add_(1)
        return x


def functional(model: nn.Module, sample: torch.Tensor):
    gm = capture(model, (sample,)).graph_module
    return run(pipelines.PREPARE, gm, story().options, stop_after="functionalize")


def test_readers_before_see_the_old_value_and_after_the_new():
    sample = torch.randn(2, 4, 4)
    gm = functional(InPlace(), sample)
    assert not [t for t in targets(gm) if t.split(".")[1].endswith("_")]
    torch.testing.assert_close(gm(sample), InPlace()(sample))


def test_the_whole_preparation_keeps_the_value():
    sample = torch.randn(2, 4, 4)
    gm = run(pipelines.PREPARE, capture(InPlace(), (sample,)).graph_module, story().options)
    torch.testing.assert_close(gm(sample), InPlace()(sample))


def test_a_write_through_a_view_is_refused():
    with pytest.raises(PassError, match="has views"):
        functional(WritesIntoAView(), torch.randn(2, 4, 4))


def test_golden():
    golden(__file__, functional(InPlace(), torch.randn(2, 4, 4)))
