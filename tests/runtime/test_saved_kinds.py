"""Whatever a module does with plain arguments can be saved, and computes the same when read."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.graph import runner
from fxquant.graph.capture import capture
from fxquant.graph.nodes import attribute, fake_mode
from fxquant.graph.options import Options
from fxquant.kernels.machine import detect
from fxquant.passes.pipelines import PREPARE
from fxquant.recipe import Recipe
from fxquant.runtime.document import from_document, to_bytes, to_document
from fxquant.runtime.fields import parse

OPTIONS = Options(Recipe.parse("w8a8-fast"), detect("cpu"), "auto", "cpu", False)


def captured(module: nn.Module, *example: Tensor) -> GraphModule:
    """Its float graph, with the row of quantisers that graphs have once they are lowered."""
    graph = capture(module.eval().requires_grad_(False), example).graph_module
    graph = runner.run(PREPARE, graph, OPTIONS)
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    with graph.graph.inserting_after(last):
        row = graph.graph.placeholder("row")
    with fake_mode(graph):
        row.meta["val"] = torch.empty(0, 2)
    graph.recompile()
    return graph


def reread(graph: GraphModule) -> GraphModule:
    document = to_document(graph, graph)
    tensors = {target: attribute(graph, target) for target in document["tensors"]}
    data = to_bytes(document)
    return from_document(parse(data, "graph.json"), tensors)


@torch.no_grad()
def check(module: nn.Module, *shapes: tuple[int, ...]) -> None:
    """Captured at the first shape, run at all."""
    graph = captured(module, image(*shapes[0]))
    again = reread(graph)
    for shape in shapes:
        x, row = image(*shape), torch.zeros(0, 2)
        results = []
        for one in (graph, again):
            torch.manual_seed(0)
            results.append(one(x, row))
        assert torch.equal(*results)
        torch.manual_seed(0)
        torch.testing.assert_close(results[1], module(x))


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.weight = nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.weight / self.weight.norm())


class Grid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[2], dtype=torch.float64)
        columns = torch.arange(0, x.shape[3], dtype=torch.float64) / x.shape[3]
        a, b = torch.meshgrid(rows, columns, indexing="ij")
        return x + torch.stack([a, b]).sum(0).to(x.dtype) / torch.linalg.vector_norm(a)


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x[None].transpose(1, 2)).transpose(1, 2)[0]
        return F.interpolate(self.up(frames), scale_factor=0.5, mode="bicubic", antialias=True)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fftshift(torch.fft.fftn(x, dim=(-2, -1)), dim=(-2, -1))
        row, column = x.shape[-2] // 2, x.shape[-1] // 2
        mask = 1 - F.pad(torch.full((2, 2), 0.5), (column - 1, column - 1, row - 1, row - 1))
        shifted = torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))
        return torch.fft.ifftn(shifted, dim=(-2, -1)).real


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone().index_put((torch.arange(x.shape[0])[:, None], self.index), x[:, :2])
        y = torch.slice_scatter(y, x[..., ::2] * 2, 3, 0, 2**63 - 1, 2)
        return y.masked_scatter(y > 2, torch.zeros_like(y)) + y.gather(1, (y > 0).long())


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(32.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("wide", torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2))
        turned = pairs * self.table[: x.shape[1]] * self.wide * (0.5 + 1j)
        return torch.view_as_real(turned).flatten(2).to(x.dtype)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bchw,kcd->bkdhw", x, self.weight)
        return torch.lerp(y, y.flip(-1), 0.25).nan_to_num(0.0, math.inf, -math.inf).amax((1, 2))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape) + torch.rand_like(x) + torch.bernoulli(x.sigmoid())
        return x + noise + torch.randint(0, 9, (x.shape[0], 1, 1, 1))


class Fresh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > -99, x, torch.empty_like(x)) + torch.empty(0, 4).sum()


class Many(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b, *_ = x.unbind(1)
        values, index = x.flatten(1).sort(dim=1, descending=True)
        top, where = values.topk(3)
        std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True, correction=0)
        mixed = torch.cdist(x.flatten(2), x.flatten(2)) + (a & b if a.dtype is torch.bool else 0)
        bits = (index.to(torch.int32) & 3) | (index.to(torch.int32) ^ 1)
        return mixed.sum() + top.sum() + where.sum() + (std + mean).prod() + bits.sum() + a * b


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True, bidirectional=True)
        self.act = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gru(x)[0].transpose(1, 2)[:, :4])


class Fractions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., : round(x.shape[2] * 0.6), :]
        return kept * x.shape[3] ** -0.5 + x.shape[2] ** -1 + round(x.shape[3] / 3, 1)


class Chosen(nn.Module):
    """Works on the tokens that are not zero, of which there are as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        at = torch.nonzero(x[..., 0].flatten() > 0).flatten()
        return tokens.index_copy(0, at, self.inner(tokens[at])).view(x.shape)


SHAPES = ((2, 4, 8, 8), (3, 4, 12, 6), (1, 4, 10, 16))
TOKENS = ((2, 7, 4), (3, 7, 4), (1, 7, 4))


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export's, of a GRU
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (Grouped, SHAPES), (Grid, SHAPES), (Video, SHAPES), (Spectrum, SHAPES),
        (Scattered, SHAPES), (Einsum, SHAPES), (Noisy, SHAPES),
        (Fresh, SHAPES), (Fractions, SHAPES), (Many, SHAPES), (Rotary, TOKENS), (Recurrent, TOKENS),
        (Chosen, TOKENS),
    ],
)  # fmt: skip
def test_what_is_read_computes_the_same(
    kind: type[nn.Module], shapes: tuple[tuple[int, ...], ...]
) -> None:
    torch.manual_seed(1)
    check(kind(), *shapes)


def sized(x: Tensor, row: Tensor) -> Tensor:
    """Computes with sizes in most of the ways there are."""
    height, width = x.shape[-2:]
    side = torch.sym_max(height, width) + torch.sym_min(height, 3) * 2 - (-height) // 3
    scale = math.ceil(height / 2) + math.floor(width * 0.7) + math.trunc(height / 3) + height**2 % 5
    scale = scale + torch.sym_ite(height > 100, 1, 2) + torch.sym_float(width) ** 0.5
    padded = F.pad(x, (0, side - width, 0, side - height))
    return padded[..., : height + 1, :] * scale


def test_sizes_may_be_computed_in_any_way() -> None:
    graph = make_fx(sized, tracing_mode="symbolic", pre_dispatch=True)(
        image(2, 4, 8, 6), torch.zeros(0, 2)
    )
    [*_, row] = [n for n in graph.graph.nodes if n.op == "placeholder"]
    row._rename("row")  # make_fx numbers them
    graph.recompile()
    again = reread(graph)
    for shape in SHAPES:
        args = image(*shape), torch.zeros(0, 2)
        assert torch.equal(again(*args), sized(*args))


class Masked(nn.Module):
    """Writes where a mask says; how often is known when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        positive, y = x > 0.5, x.clone()
        y[positive] *= 0.5
        return y + x[positive].sum()


class Named(nn.Module):
    """Looks its patches up by a name that Python has no variable of."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.ModuleDict({"2-1": nn.Conv2d(4, 4, 1)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.patches["2-1"](x)
        return out


@pytest.mark.parametrize("module", [Masked(), Named()])
def test_counts_and_names_with_a_hyphen_are_read_again(module: nn.Module) -> None:
    check(module, (2, 4, 6, 6), (3, 4, 5, 7))
