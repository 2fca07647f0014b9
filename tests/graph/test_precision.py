"""What counts, indexes or measures time keeps its digits; every operator runs in a dtype it has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.calibration.calls import read_calls
from fxquant.compiler import fake_quantise
from fxquant.graph import runner
from fxquant.graph.nodes import is_layer, module_path, note
from fxquant.graph.options import Options
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests.toy import relative_error

DIM, PIXELS = 16, 64
FLOAT = ("*",)  # 8 bits would hide what 16 bits lose


class Denoiser(nn.Module):
    """Two convolutions with an embedding of something added in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.back = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.linear = nn.Linear(DIM, 16)
        frequencies = torch.exp(-math.log(10000) * torch.arange(DIM // 2) / (DIM // 2))
        self.register_buffer("frequencies", frequencies)

    def embedded(self, numbers: Tensor, like: Tensor) -> Tensor:
        angles = numbers[..., None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)

    def drawn(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.first(x) + 2 * self.linear(embedding)[:, :, None, None]
        return self.back(F.silu(h))


class CalledTimesteps(Denoiser):
    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.drawn(x, self.embedded(timesteps, x))


class CalledT(Denoiser):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drawn(x, self.embedded(t, x))


class LogOfSigma(Denoiser):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.drawn(x / sigma[:, None, None, None], self.embedded(sigma.log() * 140, x))


class Sizes(Denoiser):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.drawn(x, self.embedded(ids.float(), x))


class TokenCount(Denoiser):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        mask = torch.arange(2000, device=x.device) < ids[:, None]
        return self.drawn(x, self.embedded(mask.to(x.dtype).sum(1), x))


class Guidance(Denoiser):
    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        return self.drawn(x, self.embedded(guidance * 1000, x))


class LinearOfTime(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(1, DIM)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        features = self.linear_1(time[:, None].to(x.dtype)) - 990 * self.linear_1.weight[:, 0]
        return self.drawn(x, features)


class Positions(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        place = torch.arange(x.shape[2] * x.shape[3], device=x.device) * 17
        map_ = self.embedded(place, x).T.reshape(1, DIM, *x.shape[2:])
        return self.drawn(x, self.embedded(timestep, x)) + map_[:, :4]


class CountedPositions(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        place = torch.ones_like(x[:, 0]).flatten(1).cumsum(1) * 17
        map_ = self.embedded(place, x).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.drawn(x, self.embedded(timestep, x)) + map_[:, :4]


class Siren(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = torch.sin(100 * self.first(x))
        return (
            torch.sin(100 * self.back(h))
            + self.linear(self.embedded(timestep, x))[:, :4, None, None]
        )


class Rotary(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.linear(self.first(x).flatten(2).transpose(1, 2))
        angles = torch.outer(torch.arange(PIXELS, device=x.device) * 31.0, self.frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)
        turned = torch.view_as_complex(h.float().unflatten(-1, (-1, 2))) * turns
        q = torch.view_as_real(turned).flatten(2).type_as(h)[:, None]
        y = F.scaled_dot_product_attention(q, q, h[:, None])[:, 0].transpose(1, 2)
        return (
            self.back(y.unflatten(2, x.shape[2:])) + self.embedded(timestep, x)[:, :4, None, None]
        )


class Fourier(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.fft.ifftn(torch.fft.fftn(h.float(), dim=(2, 3)) * 0.9, dim=(2, 3)).real
        return self.back(h.to(x.dtype)) + self.embedded(timestep, x)[:, :4, None, None]


class Fractions(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        place = 300 * self.first(x)
        return self.back(place - place.floor()) + self.embedded(timestep, x)[:, :4, None, None]


class OwnFloat(Denoiser):
    """The rounding of the model itself: only in 16 bits are its casts more than no-ops."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = (self.first(x).float() + 100) - 100
        return self.back(h.to(x.dtype)) + self.embedded(timestep, x)[:, :4, None, None]


class NothingToSee(Denoiser):
    """A row of the mask that hides every key is -3.4e38 everywhere: uniform weights, no NaN."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(x).flatten(2).transpose(1, 2)
        mask = (torch.arange(PIXELS, device=x.device) >= 0).to(x.dtype) * torch.finfo(x.dtype).min
        weights = (h @ h.transpose(1, 2) + mask).softmax(-1)
        y = (weights @ h).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.back(y) + self.embedded(timestep, x)[:, :4, None, None]


class OddOperators(Denoiser):
    """Operators with parameters, and some that mix dtypes where one is float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(16), nn.PReLU(16)
        self.up, self.line = nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv1d(16, 16, 3, padding=1)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(16, 16) / 4)
        self.scale = nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.act(self.norm(self.first(x))) * self.scale
        z = self.line(F.avg_pool2d(self.up(h), 2).flatten(2))
        z = torch.einsum("bct,cd->bdt", z, self.matrix)
        z = torch.lerp(z, z.tanh(), 0.3) + self.gru(z.transpose(1, 2))[0].transpose(1, 2)
        z = torch.baddbmm(z, self.matrix.expand(x.shape[0], -1, -1), z)
        h = z.unflatten(2, x.shape[2:])
        index = h.mean((2, 3)).argmax(1)
        return self.back(h) + self.embedded(index + timestep, x)[:, :4, None, None]


def inputs(model: nn.Module, dtype: torch.dtype, number: float) -> dict[str, Any]:
    """A call whose first sample has this number for a time, a size or a guidance."""
    name = model.forward.__code__.co_varnames[2]
    given = torch.tensor([number, 300.0])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"x": x.to(dtype), name: given.long() if name == "ids" else given}


def compiled(model: nn.Module, call: dict[str, Any], compute: str = "bfloat16") -> Any:
    """Its lowered graph for a CPU, bound without native kernels, as a function of a call."""
    recipe = Recipe.parse("w8a8-fast").with_(compute_dtype=compute, keep_float=FLOAT)
    options = Options(recipe, Machine.named("x86-vnni"), "reference")
    signature, calls = read_calls([call], model)
    fake = fake_quantise(model, signature, calls, options)
    graph = runner.run((*pipelines.LOWER, *pipelines.BIND), fake.graph, options)

    def run(call: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return graph(*signature.flatten((), call), fake.table.row(0))

    run.graph = graph  # type: ignore[attr-defined]
    return run


COUNTING = (
    CalledTimesteps, CalledT, LogOfSigma, Sizes, TokenCount, Guidance, LinearOfTime,
)  # fmt: skip


@pytest.mark.parametrize("kind", COUNTING)
def test_neighbouring_numbers_are_distinguished(kind):
    model = kind().eval()
    run = compiled(model, inputs(model, torch.float32, 999))
    a, b = (inputs(model, torch.float32, n) for n in (999, 1000))
    with torch.no_grad():
        assert relative_error(run(a), model(**a)) < 0.02
        assert relative_error(run(b) - run(a), model(**b) - model(**a)) < 0.3


class LinearOfIds(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(1, DIM)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.drawn(x, torch.sin(self.linear_1(ids.to(x.dtype)[:, None] / 100)))


@pytest.mark.parametrize("kind", [LinearOfTime, LinearOfIds])
def test_layers_of_a_few_numbers_are_not_quantised(kind):
    model = kind().eval()
    call = inputs(model, torch.float32, 999)
    options = Options(Recipe.parse("w8a8-fast"), Machine.named("x86-vnni"), "reference")
    signature, calls = read_calls([call], model)
    graph = fake_quantise(model, signature, calls, options).graph
    layers = {module_path(n): note(n, "quant") for n in graph.graph.nodes if is_layer(n)}
    assert "few exact numbers" in layers.pop("linear_1")["float"]
    assert layers.keys() == {"first", "back", "linear"}
    assert not any("float" in quant for quant in layers.values())


OTHERS = (
    Positions, CountedPositions, Siren, Rotary, Fourier, Fractions, NothingToSee,
    OddOperators,
)  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_close_to_the_float_model(kind):
    model = kind().eval()
    call = inputs(model, torch.float32, 999)
    with torch.no_grad():
        assert relative_error(compiled(model, call)(call), model(**call)) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Sizes, Rotary, OwnFloat, OddOperators])
def test_models_of_16_bits(kind, dtype):
    model = kind().eval().to(dtype)
    call = inputs(model, dtype, 999)
    with torch.no_grad():
        result, truth = compiled(model, call)(call), model(**call)
    assert result.dtype == dtype
    assert relative_error(result, truth) < 0.04
