"""Edges see through layout and through the padding that a convolution can do itself, no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.edges import Edge, edge_root
from fxquant.graph.nodes import CONSTANT_PAD, PAD
from tests.toy import relative_error

Before = Callable[[Tensor], Tensor]


class Padded(nn.Module):
    """A convolution, something on its way, and another."""

    def __init__(self, before: Before, channels: int = 16, padding: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.before = before
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.conv = nn.Conv2d(channels, 16, 3, padding=padding)

    def forward(self, sample: Tensor) -> Tensor:
        h: Tensor = self.conv(self.before(silu(self.first(sample))))
        return h


INSIDE = [
    (lambda h: pad(h, (1, 1, 1, 1)), 0),
    (lambda h: pad(h, (0, 1, 0, 1)), 1),
    (lambda h: pad(h, (2, 1)), 1),
    (lambda h: pad(h, (1, 1, 1, 1, 0, 0), value=0.0), 0),
    (lambda h: pad(h, (5, 6, 7, 4)), 0),
    (lambda h: torch.constant_pad_nd(h, (1, 1, 2, 1), 0), 0),
    (lambda h: pad(h.permute(0, 1, 3, 2), (1, 0, 0, 2)), 0),
]
OUTSIDE = [
    (lambda h: pad(h, (-1, -1, -1, -1)), 16, 1),
    (lambda h: pad(h, (-1, 1, 2, -1)), 16, 0),
    (lambda h: pad(h, (0, 0, 0, 0, 0, 8)), 24, 1),
    (lambda h: pad(h, (1, 1, 1, 1, 4, 4)), 24, 0),
    (lambda h: pad(h, (0, 0, 0, 0, -4, 0)), 12, 1),
    (lambda h: pad(h, (1, 1, 1, 1, 0, 0, 0, 1)), 16, 0),
    (lambda h: pad(h, (1, 1, 1, 1), value=1.0), 16, 0),
    (lambda h: pad(h, (1, 1, 1, 1), mode="reflect"), 16, 0),
    (lambda h: pad(h, (1, 1, 1, 1), mode="circular"), 16, 0),
    (lambda h: pad(h, (1, 0, 1, 1)).permute(0, 1, 3, 2), 16, 0),
    (lambda h: pad(h, (-1, 0, 0, -1)).permute(0, 1, 3, 2), 16, 1),
    (lambda h: pad(h, (0, h.shape[3] // 4, 0, h.shape[2] // 4)), 16, 0),
    (lambda h: torch.constant_pad_nd(h, (1, 1, -1, 1), 0), 16, 0),
]


def compiled(model: nn.Module) -> fxquant.QuantizedModel:
    """And compared with the model, at a batch of its own and another one."""
    torch.manual_seed(1)
    calls = [(torch.randn(2, 16, 8, 8),) for _ in range(3)]
    quantised = fxquant.compile(model.eval(), calls, progress=False)
    for sample in (calls[0][0], torch.randn(3, 16, 8, 8), torch.randn(1, 16, 12, 16)):
        with torch.no_grad():
            assert relative_error(quantised(sample), model(sample)) < 0.03
    return quantised


def pads(quantised: fxquant.QuantizedModel) -> int:
    return sum(n.target in (PAD, CONSTANT_PAD) for n in quantised.graph.graph.nodes)


@pytest.mark.parametrize(("before", "padding"), INSIDE)
def test_zero_padding_of_an_image_moves_into_the_convolution(before: Before, padding: int) -> None:
    assert pads(compiled(Padded(before, padding=padding))) == 0


@pytest.mark.parametrize(("before", "channels", "padding"), OUTSIDE)
def test_other_padding_stays_an_operator(before: Before, channels: int, padding: int) -> None:
    assert pads(compiled(Padded(before, channels, padding))) == 1


def graph_of(before: Before) -> tuple[torch.fx.Node, torch.fx.Node]:
    """The second convolution, and the padding before it."""
    gm = capture(Padded(before), (torch.randn(2, 16, 8, 8),)).graph_module
    (conv,) = [n for n in gm.graph.nodes if n.name == "conv2d_1"]
    (padding,) = [n for n in gm.graph.nodes if n.target is PAD]
    return conv, padding


def test_a_quantiser_stays_below_what_something_else_reads() -> None:
    def shared(h: Tensor) -> Tensor:
        padded = pad(h, (1, 1, 1, 1))
        return padded.clone() + padded.mean()

    conv, padding = graph_of(shared)
    edge = Edge(conv, "input")
    root, chain = edge_root(edge, {edge})
    assert (root, chain) == (conv.args[0], [])
    assert padding is not root


def test_a_quantiser_goes_above_padding_that_moves_inside() -> None:
    conv, padding = graph_of(lambda h: pad(h, (1, 1, 1, 1)))
    edge = Edge(conv, "input")
    assert edge_root(edge, {edge}) == (padding.args[0], [padding])
