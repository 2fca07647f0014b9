"""Lowered graphs against fake-quant: every operator on equal inputs, and the whole by its error.

Two correct executions of a quantised network drift apart end to end by about the quantisation
error, so only operators are compared with each other; whole networks are compared by their
distance to the float model.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.assets import load_digits_unet
from fxquant.calibration.calls import read_calls
from fxquant.compiler import fake_quantise
from fxquant.evaluate.op_by_op import Difference, compare
from fxquant.graph.lowered import arguments, is_op
from fxquant.graph.nodes import attribute, set_buffer
from fxquant.graph.options import Options
from fxquant.graph.runner import clone, run
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests import models

FLOAT_LIMIT, INTEGER_LIMIT, END_TO_END = 1e-5, 1, 1.1
CASES = [
    ("toy", "w8a8-fast"),
    ("toy", "w4a8-fast"),
    ("digits", "w8a8-fast"),
    ("sdxl", "w8a8-fast"),
    *(
        pytest.param(name, recipe, marks=pytest.mark.slow)
        for name, recipe in [
            ("digits", "w4a8-fast"),
            ("ddpm", "w4a8-fast"),
            ("sd", "w8a8-fast"),
            ("ldm", "w8a8-fast"),
        ]
    ),
]


class Lowered:
    """One model, calibrated, fake-quantised and lowered for this machine in float32."""

    def __init__(self, name: str, recipe: str):
        model = load_digits_unet() if name == "digits" else models.build(name)
        calls = digits_calls() if name == "digits" else models.calls(name, n=3)
        options = Options(Recipe.parse(recipe).with_(compute_dtype="float32"), backend="auto")
        signature, self.calls = read_calls(calls, model)
        fake = fake_quantise(model, signature, self.calls, options)
        self.fake_quant, self.row = fake.graph, fake.table.row(0)
        self.graph = run((*pipelines.LOWER, *pipelines.BIND), fake.graph, options)
        with torch.no_grad():
            self.float_results = torch.cat([model(**call).sample for call in calls])

    def compare(self, graph: GraphModule | None = None) -> list[Difference]:
        """The graph's operators (its own by default) on the inputs that fake-quant has."""
        return compare(self.fake_quant, graph or self.graph, self.calls[0], self.row)

    def error(self, graph: GraphModule) -> float:
        """Relative error to the float model over all calls."""
        with torch.no_grad():
            results = torch.cat([graph(*call, self.row) for call in self.calls])
        return float((results - self.float_results).norm() / self.float_results.norm())


def digits_calls() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "sample": torch.randn(4, 1, 16, 16, generator=generator),
            "timestep": torch.tensor(t),
            "class_labels": torch.tensor([0, 3, 7, 9]),
        }
        for t in (999, 500, 0)
    ]


lowered = functools.cache(Lowered)


def wrong(differences: list[Difference]) -> list[Difference]:
    """Those over their limit, NaN included."""
    return [d for d in differences if not d.error <= (INTEGER_LIMIT if d.integer else FLOAT_LIMIT)]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_every_operator_equals_fake_quant_on_the_same_inputs(name: str, recipe: str) -> None:
    differences = lowered(name, recipe).compare()
    assert wrong(differences) == []
    assert {d.integer for d in differences} == {True, False}


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_error_to_the_float_model_is_that_of_fake_quant(name: str, recipe: str) -> None:
    made = lowered(name, recipe)
    simulated, real = made.error(made.fake_quant), made.error(made.graph)
    assert 1e-4 < simulated < 0.5
    assert real <= END_TO_END * simulated


def test_no_lowered_operator_is_left_out() -> None:
    made = lowered("sdxl", "w8a8-fast")
    compared = {d.node for d in made.compare()}
    assert {n.name for n in made.graph.graph.nodes if is_op(n)} <= compared


def layer(gm: GraphModule, path: str) -> Any:
    """The lowered layer with this weight."""
    nodes = [n for n in gm.graph.nodes if is_op(n) and "weight_scale" in arguments(n)]
    return next(n for n in nodes if arguments(n)["weight"].target == f"{path}.weight")


def corrupted(path: str, name: str, value: Tensor) -> list[Difference]:
    """The toy's differences with one constant of one layer replaced."""
    made = lowered("toy", "w8a8-fast")
    gm = clone(made.graph)
    set_buffer(gm, f"{path}.{name}", value)
    found = wrong(made.compare(gm))
    assert all(d.node == layer(gm, path).name for d in found), "an innocent operator is accused"
    return found


def constant(path: str) -> Tensor:
    value: Tensor = attribute(lowered("toy", "w8a8-fast").graph, path)
    return value.clone()


CONV = "down_resnet.conv1"


def test_one_wrong_integer_weight_is_found() -> None:
    weight = constant(f"{CONV}.weight")
    weight[3, 2, 1, 1] = -weight[3, 2, 1, 1] - 1
    assert corrupted(CONV, "weight", weight)


def test_a_slightly_wrong_scale_is_found() -> None:
    scale = constant(f"{CONV}.weight_scale")
    assert corrupted(CONV, "weight_scale", scale * (1 + 1e-3))


def test_a_wrong_bias_is_found() -> None:
    bias = constant(f"{CONV}.bias")
    bias[5] += 0.01
    assert corrupted(CONV, "bias", bias)


def test_a_result_that_is_not_a_number_is_found() -> None:
    scale = constant(f"{CONV}.weight_scale")
    assert corrupted(CONV, "weight_scale", scale * torch.nan)


def test_the_constants_themselves_are_fine() -> None:
    for name in ("weight", "weight_scale", "bias"):
        assert corrupted(CONV, name, constant(f"{CONV}.{name}")) == []


def test_wrong_integers_are_found() -> None:
    made = lowered("toy", "w8a8-fast")
    gm = clone(made.graph)
    node = next(n for n in gm.graph.nodes if n.name == "fq_0")
    activation = list(arguments(node)).index("activation")
    assert node.args[activation] == "silu"
    node.update_arg(activation, "none")
    (found,) = wrong(made.compare(gm))
    assert (found.node, found.integer) == ("fq_0", True)
    assert found.error > 10


def test_a_wrong_constant_shows_in_the_error_to_the_float_model() -> None:
    made = lowered("toy", "w8a8-fast")
    gm = clone(made.graph)
    set_buffer(gm, f"{CONV}.weight", constant(f"{CONV}.weight").flip(0))
    assert made.error(gm) > END_TO_END * made.error(made.fake_quant)
