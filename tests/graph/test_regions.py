"""Regions of a model that run under something: what of them can be captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CaptureError


class Mapped(nn.Module):
    """Writes which tokens each row may see, row by row, as create_block_mask does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        def row(at: Tensor) -> Tensor:
            seen = torch.zeros(4, dtype=torch.int32).new_zeros(4)
            return seen.index_put((at[None],), torch.ones((), dtype=torch.int32))

        mask = torch.vmap(row)(torch.arange(4))
        return self.layer(x) * mask.sum()


def test_a_function_under_vmap_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"under torch.vmap \(test_regions.py:\d+ in \w+"):
        fxquant.compile(Mapped().eval(), [(torch.randn(2, 4, 8),)])
