"""Random numbers are drawn in every call, those that the module itself would draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.errors import CaptureError
from fxquant.graph.capture import capture
from fxquant.graph.nodes import is_random, note
from fxquant.graph.options import Options
from fxquant.graph.runner import run
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests.toy import relative_error

OPTIONS = Options(Recipe.parse("w8a8-fast"), machine=Machine.named("x86-vnni"))


class Noisy(nn.Module):
    """Noise between two convolutions."""

    def __init__(self, noise: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.noise = noise
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        h: Tensor = self.conv(self.noise(self.first(sample)))
        return h


DRAWS = {
    "of no input": lambda h: h + torch.randn(16).view(16, 1, 1),
    "like": lambda h: h + torch.rand_like(h) + torch.randn_like(h),
    "two": lambda h: h + torch.rand(16, 1, 1) + torch.rand(16, 1, 1),
    "dropout": lambda h: F.dropout2d(F.dropout(h, 0.3, training=True), 0.1, training=True),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full((16, 1, 1), 0.5)),
    "in place": lambda h: (
        h + torch.empty(16, 1, 1).normal_() * torch.ones(16, 1, 1).bernoulli_(0.5)
    ),
    "like, in place": lambda h: h + torch.empty_like(h).uniform_(-1, 1),
    "integers": lambda h: h[:, torch.randperm(16)] + torch.randint(0, 5, (16, 1, 1)),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.2),
}


@pytest.mark.parametrize("noise", DRAWS.values(), ids=DRAWS)
def test_the_prepared_graph_draws_the_modules_numbers_anew(noise) -> None:
    model, sample = Noisy(noise).eval(), torch.randn(2, 16, 8, 8)
    gm = run(pipelines.PREPARE, capture(model, (sample,)).graph_module, OPTIONS)
    assert any(map(is_random, gm.graph.nodes))
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            wanted = model(sample)
        torch.manual_seed(seed)
        with torch.no_grad():
            results.append(gm(sample))
        torch.testing.assert_close(results[-1], wanted)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("machine", ["", "vnni"])
@pytest.mark.parametrize("name", ["of no input", "like", "like, in place"])
def test_so_does_the_compiled_model_in_its_first_call_and_its_fifth(
    name: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine:
        monkeypatch.setenv("FXQUANT_CPU", machine)
    model, sample = Noisy(DRAWS[name]).eval(), torch.randn(2, 16, 8, 8)
    quantised = fxquant.compile(model, [(sample,)] * 8, progress=False)
    for seed in range(5):
        with torch.no_grad():
            torch.manual_seed(seed)
            wanted = model(sample)
            torch.manual_seed(seed)
            assert relative_error(quantised(sample), wanted) < 0.1


def test_noise_is_not_a_function_of_the_timestep() -> None:
    class Model(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            time = timestep.float()
            return sample + (time * 2 + torch.rand_like(time)).view(-1, 1, 1, 1)

    call = (torch.randn(2, 3, 4, 4), torch.tensor([1, 2]))
    gm = run(pipelines.PREPARE, capture(Model(), call).graph_module, OPTIONS)
    marked = [n.name for n in gm.graph.nodes if note(n, "timestep_only")]
    assert "mul" in marked
    assert not {"rand_like", "add"} & {*marked}


def test_what_draws_in_training_alone_is_not_random() -> None:
    gru = nn.GRU(8, 8, dropout=0.5, num_layers=2).eval()

    def quiet(h: Tensor) -> Tensor:
        h = F.dropout(F.scaled_dot_product_attention(h, h, h), 0.5, training=False)
        return h + gru(F.rrelu(h)[:, :, 0])[0].mean()

    model = Noisy(quiet)
    gm = capture(model, (torch.randn(2, 16, 8, 8),)).graph_module
    assert not any(map(is_random, gm.graph.nodes))


def test_a_generator_of_the_models_own_is_refused() -> None:
    generator = torch.Generator()
    model = Noisy(lambda h: h + torch.randn(16, 1, 1, generator=generator))
    gm = capture(model, (torch.randn(2, 16, 8, 8),)).graph_module
    with pytest.raises(CaptureError, match=r"%randn.*generator.*test_random\.py|%randn.*generator"):
        run(pipelines.PREPARE, gm, OPTIONS)
