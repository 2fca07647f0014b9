"""What forward sets is named, and undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.state import kept


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(1))
        self.register_buffer("total", torch.ones(1))
        self.number, self.last = 1, None

    def rebind(self) -> None:
        self.count = self.count + 1

    def write(self) -> None:
        self.total.add_(1)

    def step(self) -> None:
        self.number += 1

    def keep(self) -> None:
        self.last = torch.ones(1)

    def nothing(self) -> Tensor:
        return self.count + self.number


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("rebind", "self.count = self.count + 1"),
        ("write", "self.total.add_(1)"),
        ("step", "self.number += 1"),
        ("keep", "self.last = torch.ones(1)"),
    ],
)
def test_what_was_set_is_named_with_its_line_and_undone(method, line):
    model = nn.Sequential(Counts())
    buffer = model[0].count
    with kept(model) as changes:
        getattr(model[0], method)()
    (said,) = changes
    assert "test_state.py:" in said
    assert said.endswith(f": {line})")
    assert (model[0].count is buffer, model[0].number, model[0].last) == (True, 1, None)
    assert (buffer.item(), model[0].total.item()) == (1, 1)


def test_a_module_that_sets_nothing():
    model = Counts()
    with kept(model) as changes:
        model.nothing()
    assert changes == []
