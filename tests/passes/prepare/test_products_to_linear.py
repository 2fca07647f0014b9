"""Products with a parameter are linears; products with what is computed are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.graph.capture import capture
from fxquant.graph.nodes import LINEAR, calls
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from tests.passes.small import Model, compiled, parameter, prepared
from tests.toy import golden, story

WIDE, SHARED = (3, 6, 16), (1, 16, 24)


def _shared(model: Model, x: Tensor) -> Tensor:
    return torch.bmm(x, model.w.expand(x.shape[0], -1, -1))


def _added(model: Model, x: Tensor) -> Tensor:
    return torch.baddbmm(model.b, x, model.w.expand(x.shape[0], -1, -1), beta=2, alpha=0.5)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (Model(lambda m, x: x @ m.w, w=parameter(16, 24)), WIDE),
        (Model(lambda m, x: x @ m.w.T, w=parameter(24, 16)), WIDE),
        (Model(lambda m, x: m.w @ x, w=parameter(24, 6)), WIDE),
        (Model(lambda m, x: x @ m.w, w=parameter(*SHARED)), WIDE),
        (Model(lambda m, x: torch.mm(x, m.w), w=parameter(16, 24)), (3, 16)),
        (Model(lambda m, x: torch.addmm(m.b, x, m.w), w=parameter(16, 24), b=parameter(24)),
         (3, 16)),
        (Model(_shared, w=parameter(*SHARED)), WIDE),
        (Model(_added, w=parameter(*SHARED), b=parameter(1, 1, 24)), WIDE),
    ],
)  # fmt: skip
def test_they_are_linears(model: Model, sizes: tuple[int, ...]) -> None:
    gm = prepared(model, torch.randn(*sizes))
    assert len(list(calls(gm, LINEAR))) == 1
    assert not [n for n in gm.graph.nodes if "mm" in str(n.target) or "matmul" in str(n.target)]


def test_a_matrix_for_each_head_and_a_computed_one_stay() -> None:
    heads = Model(lambda m, x: x @ m.w, w=parameter(2, 16, 24))
    assert not list(calls(prepared(heads, torch.randn(3, 2, 6, 16)), LINEAR))
    computed = Model(lambda m, x: x @ m.w.softmax(0), w=parameter(16, 24))
    assert not list(calls(prepared(computed, torch.randn(3, 6, 16)), LINEAR))


def test_they_are_integer_layers() -> None:
    model = Model(lambda m, x: (x @ m.a).relu() @ m.b.T, a=parameter(16, 32), b=parameter(8, 32))
    served = compiled(model, torch.randn(4, 6, 16), strict=True)
    assert served.summary.precision == {"w8a8": 2}


def test_golden() -> None:
    model = Model(lambda m, x: x @ m.w, w=parameter(16, 24))
    gm = capture(model.eval(), (torch.randn(2, 6, 16),)).graph_module
    golden(__file__, run(pipelines.PREPARE, gm, story().options, stop_after="products_to_linear"))
