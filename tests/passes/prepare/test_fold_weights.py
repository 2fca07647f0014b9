"""What is computed from parameters is a parameter; filters and random numbers are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from fxquant.graph.capture import capture
from fxquant.graph.nodes import LINEAR, calls, is_learned
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from fxquant.passes.pipelines import PREPARE
from tests.passes.small import Model, compiled, parameter, prepared
from tests.toy import golden, story, targets


def test_a_normed_weight_is_one_weight_of_its_layer_at_any_size() -> None:
    model = Model(lambda m, x: m.layer(x), layer=parametrizations.weight_norm(nn.Linear(300, 300)))
    gm = prepared(model, torch.randn(2, 300))
    (layer,) = calls(gm, LINEAR)
    assert targets(gm) == ["aten.linear.default"]
    assert str(layer.args[1].target) == "layer.weight"
    assert is_learned(gm, layer.args[1])


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_it_is_quantised(norm) -> None:
    model = Model(lambda m, x: m.b(F.silu(m.a(x))),
                  a=norm(nn.Conv2d(8, 8, 3, padding=1)), b=norm(nn.Conv2d(8, 8, 1)))  # fmt: skip
    served = compiled(model, torch.randn(4, 8, 6, 6), strict=True)
    assert served.summary.precision == {"w8a8": 2}


def test_a_fixed_filter_stays_float_and_is_called_that() -> None:
    model = Model(lambda m, x: F.conv2d(m.a(x), m.blur * 1.0) + F.conv2d(x, m.blur),
                  a=nn.Conv2d(8, 8, 1), blur=torch.ones(8, 8, 3, 3) / 72)  # fmt: skip
    served = compiled(model, torch.randn(4, 8, 6, 6), strict=True)
    assert served.summary.precision == {"w8a8": 1, "float": 2}
    assert [*served.summary.stayed_float] == ["its weight is a fixed filter, not a parameter"]


def test_a_linear_of_learned_tokens_is_computed_once() -> None:
    model = Model(lambda m, x: m.q(x) @ m.k(m.tokens).transpose(-1, -2),
                  q=nn.Linear(16, 16), k=nn.Linear(16, 16),
                  tokens=parameter(1, 5000, 16))  # fmt: skip
    served = compiled(model, torch.randn(4, 6, 16))
    assert served.summary.precision["w8a8"] == 1


def test_random_weights_are_drawn_anew() -> None:
    model = Model(lambda m, x: x + m.w * torch.randn(16), w=parameter(16))
    steps = [step for step in PREPARE if step.name == "fold_weights"]
    gm = run(steps, capture(model, (torch.randn(2, 16),)).graph_module, story().options)
    assert any("randn" in target for target in targets(gm))


def test_a_parameter_that_others_read_keeps_its_name() -> None:
    model = Model(lambda m, x: F.linear(F.silu(m.a(x)), m.a.weight.t()), a=nn.Linear(16, 24))
    gm = prepared(model, torch.randn(2, 16))
    first, second = calls(gm, LINEAR)
    assert str(first.args[1].target) == "a.weight"
    assert str(second.args[1].target) == "a.weight_2"


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(16, 0), (0, 16)])
def test_a_layer_without_elements_runs(sizes: tuple[int, int]) -> None:
    def forward(model: Model, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.a(x), model.none(x[..., : sizes[0]])], -1)

    model = Model(forward, a=nn.Linear(16, 16), none=nn.Linear(*sizes))
    served = compiled(model, torch.randn(4, 6, 16), strict=True)
    assert served.summary.stayed_float == {"its weight is empty": ("none",)}


def test_golden() -> None:
    model = Model(lambda m, x: torch.nn.functional.linear(x, m.w.t() * 2), w=parameter(16, 24))
    gm = capture(model.eval(), (torch.randn(2, 6, 16),)).graph_module
    golden(__file__, run(pipelines.PREPARE, gm, story().options, stop_after="fold_weights"))
