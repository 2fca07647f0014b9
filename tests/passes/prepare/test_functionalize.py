"""functionalize: the graph computes what the module does, whatever it writes into, or says no."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import CaptureError
from fxquant.graph.aliases import writes
from fxquant.graph.capture import capture
from fxquant.graph.options import Options
from fxquant.graph.runner import run
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests.toy import golden, story, targets

OPTIONS = Options(Recipe.parse("w8a8-fast"), machine=Machine.named("x86-vnni"))


class Writes(nn.Module):
    """A module whose forward is one of the functions below."""

    def __init__(self, body: Callable[[Writes, Tensor], Tensor]):
        super().__init__()
        self.body = body
        self.register_buffer("scale", torch.ones(4, 1, 1))
        self.drop, self.relu, self.norm = nn.Dropout(0.5), nn.ReLU(inplace=True), nn.BatchNorm2d(4)
        self.eval()

    def forward(self, sample: Tensor) -> Tensor:
        return self.body(self, sample)


def prepared(model: nn.Module, sample: Tensor, **kwargs: object) -> GraphModule:
    graph = capture(model, (sample.clone(),)).graph_module
    return run(pipelines.PREPARE, graph, OPTIONS, **kwargs)  # type: ignore[arg-type]


def select(m, x):
    h = x * 2
    h[:, 0] = 0
    return h


def channels(m, x):
    h = x * 2
    h[:, :2].mul_(3)
    return h + h[:, :1]


def chunks(m, x):
    h = x * 2
    a, b = h.chunk(2, 1)
    a += 1
    return h + torch.cat([b, a], 1)


def splits(m, x):
    h = x * 2
    a, b = h.split([1, 3], 1)
    b[:, 0] = 7
    a.fill_(2.0)
    return torch.cat([b, a], 1) + h


def unbound(m, x):
    h = x * 2
    a, b, c, d = h.unbind(1)
    b.copy_(a)
    d.zero_()
    return h + c.unsqueeze(1)


def chunks_of_chunks(m, x):
    h = x * 2
    h.chunk(2, 1)[0].chunk(2, 1)[1][:, 0, ::2] = 4
    return h


def detached(m, x):
    h = x * 2
    h.detach().add_(1)
    return h


def slice_copied(m, x):
    h = x * 2
    h[:, 1:3].copy_(x[:, :2])
    return h


def dropout_that_drops_nothing(m, x):
    h = x * 2
    d = m.drop(h)
    d += 1
    return h * d


def rotary(m, x):
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2]
    out[..., 1::2] = -x[..., 0::2]
    return out


def masked(m, x):
    h = x * 2
    h[h > 0] = 0
    h.masked_fill_(h < -1, 0.5)
    return h


def flat(m, x):
    h = x * 2
    h.view(h.shape[0], -1)[:, ::3] = 1
    return h.sum(1) + h[:, 0]


def permuted(m, x):
    h = x * 2
    h.permute(0, 2, 3, 1)[..., 0] = 5
    h.transpose(1, 2).add_(x.transpose(1, 2))
    h.mT.add_(1)
    return h


def reshape_that_is_a_view(m, x):
    h = x * 2
    y = h.reshape(h.shape[0], 4, -1)
    h.relu_()
    return y


def reshape_that_copies(m, x):
    h = x * 2
    y = h.permute(0, 2, 3, 1).reshape(h.shape[0], -1, 4)
    h.relu_()
    return y.sum() + h


def contiguous_that_is_the_same(m, x):
    h = x * 2
    y = h.contiguous().to(torch.float32)
    y += 1
    return h


def contiguous_that_copies(m, x):
    h = (x * 2).transpose(1, 2)
    y = h.contiguous()
    y += 1
    return h


def complex_parts(m, x):
    h = torch.complex(x, x + 1)
    h.real.mul_(2)
    h.imag[:, 0] = 1
    torch.view_as_real(h)[..., 1].add_(x)
    return torch.view_as_real(h).flatten(1)


def as_complex(m, x):
    h = torch.stack([x, x * 2], -1)
    z = torch.view_as_complex(h)
    z *= 1j
    return h.flatten(3)


def diagonal(m, x):
    h = x * 2
    torch.diagonal(h, 0, 2, 3).fill_(0)
    h.narrow(1, 1, 2).mul_(2)
    return h


def exotic_views(m, x):
    h = x * 2
    h.movedim(1, 3)[..., 1] = 3
    h.unflatten(1, (2, 2))[:, 1, 0] = 4
    torch.einsum("bchw->bhwc", h)[..., 1] = 5
    h.type_as(x)[..., 1] = 6
    h.view(torch.int32).bitwise_and_(-(2**31))
    return h


def given_memory(m, x):
    h, out = x * 2, torch.empty_like(x)
    torch.add(h, 1, out=h)
    torch.mul(h, h, out=out)
    torch.stack([h[:, 0], h[:, 1]], dim=1, out=h[:, 2:])
    return out + h


def other_shapes_of_itself(m, x):
    h = x * 2
    y = h.view(-1)
    h.unsqueeze_(0)
    h += 1
    h.transpose_(1, 2)
    return y.sum() + h[0]


def other_dtypes(m, x):
    h = x.half()
    h.mul_(x)
    mask = x > 0
    mask[:, 0] = True
    return h.float() * mask


def indexed(m, x):
    h = x * 2
    h[:, torch.tensor([0, 2])] = 1.5
    h.scatter_(1, torch.zeros_like(h[:, :1], dtype=torch.long), 9.0)
    h.index_add_(1, torch.tensor([3, 3]), x[:, :2])
    return h


def free_sizes(m, x):
    h = x * 2
    h[:, :, : h.shape[2] // 2] = 0
    h[..., -1] = h[..., 0]
    return h


def in_a_loop(m, x):
    h = x * 2
    for i in range(4):
        h[:, i] = h[:, i] * i + h[:, (i + 1) % 4]
    return h


def overlapping_slices(m, x):
    h = x * 2
    a, b = h[:, :2], h[:, 1:3]
    a += 1
    b *= 2
    a -= 3
    return torch.cat([a, b, h], 1)


def chained(m, x):
    h = x * 2
    h.clamp_(min=0).add_(h.mean()).pow_(2).sqrt_().div_(3, rounding_mode="floor")
    h.lerp_(x, 0.3).addcmul_(x, x).tril_()
    return m.relu(h - 1) + h


def functions_in_place(m, x):
    h = x * 2
    nn.functional.dropout(h, 0.5, False, inplace=True)
    nn.functional.leaky_relu_(h, 0.2)
    h[~(h > 0)] *= -1
    return nn.functional.silu(h, inplace=True)


def left_behind(m, x):
    h = x * 2
    flat = h.view(h.shape[0], -1)
    h = h + 1
    flat += 1
    return h


def copy_of_a_buffer(m, x):
    scale = m.scale.clone()
    scale.squeeze()[0] = 9
    return x * scale


ALL = [
    select, channels, chunks, splits, unbound, chunks_of_chunks, detached, slice_copied, rotary,
    dropout_that_drops_nothing, masked, flat, permuted, reshape_that_is_a_view, in_a_loop,
    reshape_that_copies, contiguous_that_is_the_same, contiguous_that_copies, complex_parts,
    as_complex, diagonal, exotic_views, given_memory, other_shapes_of_itself, other_dtypes,
    indexed, free_sizes, functions_in_place, overlapping_slices, chained, left_behind,
    copy_of_a_buffer,
]  # fmt: skip


@pytest.mark.parametrize("body", ALL, ids=lambda body: body.__name__)
def test_the_prepared_graph_equals_the_module(body) -> None:
    model = Writes(body)
    gm = prepared(model, torch.randn(2, 4, 8, 8))
    assert not [n for n in gm.graph.nodes if writes(n)]
    for size in ((2, 4, 8, 8), (3, 4, 8, 8)):
        sample = torch.randn(size)
        torch.testing.assert_close(gm(sample.clone()), model(sample.clone()))


def writes_into_a_buffer(m, x):
    m.scale.view(-1)[0] = 2
    return x * m.scale


def hidden_statistics(m, x):
    norm = m.norm
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, training=True)


def overlapping(m, x):
    h = x * 2
    h.unfold(3, 2, 1)[..., 0] = 0
    return h


def several(m, x):
    h = x * 2
    torch._foreach_add_([h], 1.0)
    return h


def unclear(m, x):
    h = x * 2
    a, _ = torch.broadcast_tensors(h, x)
    a.add_(1)
    return h


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (writes_into_a_buffer, r"%copy_.* the model's own 'scale', .*keeps nothing.*\.clone\(\)"),
        (hidden_statistics, r"%batch_norm.* updates 'norm\.running_mean'"),
        (overlapping, r"%fill_.* may lie in the same place"),
        (several, r"%_foreach_add_.* fills several tensors"),
        (unclear, r"%add_.* may be that of %broadcast_tensors"),
    ],
)
def test_what_cannot_be_said_is_refused_with_its_line(body, why) -> None:
    with pytest.raises(CaptureError, match=why) as caught:
        prepared(Writes(body), torch.randn(2, 4, 8, 8))
    assert "test_functionalize.py:" in str(caught.value)


def test_the_callers_tensor_stays_as_it_was_and_one_warning_says_so(caplog) -> None:
    def body(m, x):
        x += 1
        return m.relu(x)

    model, sample = Writes(body), torch.randn(2, 4, 8, 8)
    with caplog.at_level(logging.WARNING):
        gm = prepared(model, sample)
    (message,) = [r.getMessage() for r in caplog.records if "argument" in r.getMessage()]
    assert "'sample'" in message
    assert "test_functionalize.py:" in message
    kept = sample.clone()
    torch.testing.assert_close(gm(sample), model(kept.clone()))
    assert torch.equal(sample, kept)


def test_memory_that_nobody_wrote_reads_as_zeros() -> None:
    gm = prepared(
        Writes(lambda m, x: x + torch.empty(4, 1, 1) + x.new_empty(1)), torch.ones(2, 4, 8, 8)
    )
    assert torch.equal(gm(torch.ones(2, 4, 8, 8)), torch.ones(2, 4, 8, 8))


def test_graphs_that_write_nothing_are_left_alone() -> None:
    assert targets(story()["functionalize"]) == targets(story()["capture"])


class InPlace(nn.Module):
    """Writes into a constant, into a value that is read again, and into a part."""

    def forward(self, sample: Tensor) -> Tensor:
        kernel = torch.outer(torch.arange(4.0), torch.arange(4.0))
        kernel /= kernel.sum()
        x = sample * 2
        y = x + 1
        x.mul_(3)
        x[:, :2] += 1
        return x + y + kernel


def test_golden() -> None:
    sample = torch.randn(2, 4, 4)
    golden(__file__, prepared(InPlace(), sample, stop_after="functionalize"))
