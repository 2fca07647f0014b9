"""What a pipeline turns off between calls is said to be fixed, before it is compiled."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import GatedSelfAttentionDense
from torch import Tensor, nn

import fxquant


class Grounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fuser = GatedSelfAttentionDense(16, 16, 2, 8)

    def forward(self, sample: Tensor, objects: Tensor) -> Tensor:
        return self.fuser(sample, objects)


def test_gligens_switch_is_named(caplog: pytest.LogCaptureFixture) -> None:
    calls = [{"sample": torch.randn(2, 6, 16), "objects": torch.randn(2, 3, 16)}]
    fxquant.compile(Grounded(), calls, progress=False)
    assert "'enabled' of 1 GatedSelfAttentionDense" in caplog.text
    assert "gligen_scheduled_sampling_beta=1.0" in caplog.text
