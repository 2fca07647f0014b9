"""fold_constants computes what needs no input, and only that."""

from __future__ import annotations

import torch

from fxquant.graph.capture import capture
from fxquant.graph.nodes import free_target, set_buffer
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from tests.toy import golden, relative_error, story, targets


def test_frequencies_become_a_buffer():
    before, after = story().before("fold_constants"), story()["fold_constants"]
    assert "aten.exp.default" in targets(before)
    assert "aten.exp.default" not in targets(after)
    assert relative_error(story().run(after), story().run(before)) < 1e-6


def test_large_and_input_dependent_values_stay():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(300, 300))

        def forward(self, sample):
            return sample.exp() + (self.table * 2).sum() + torch.arange(3).float().sum()

    gm = capture(Model(), (torch.ones(2, 3, 4, 4),)).graph_module
    gm = run(pipelines.PREPARE, gm, story().options, stop_after="fold_constants")
    left = targets(gm)
    assert "aten.exp.default" in left
    assert "aten.mul.Tensor" in left, "a computation on a large table was folded"
    assert "aten.arange.default" not in left


def test_names_that_are_taken_stay_what_they_are():
    """Constants are named after their operators: `to` and `half` are methods of modules, too."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constants = torch.nn.Module()
            self.constants.register_buffer("exp", torch.full((2, 2), 5.0))

        def forward(self, sample):
            to = torch.arange(3, dtype=torch.float64).to(torch.float32)
            return sample * to.exp().sum() + torch.arange(4).to(sample) + self.constants.exp.sum()

    model, x = Model(), torch.ones(2, 3, 4, 4)
    gm = capture(model, (x,)).graph_module
    gm = run(pipelines.PREPARE, gm, story().options, stop_after="fold_constants")
    assert relative_error(gm(x), model(x)) < 1e-6
    for name in ("to", "half"):
        owner = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
        target = free_target(owner, f"constants.{name}")
        set_buffer(owner, target, torch.ones(1))
        assert callable(getattr(owner.constants, name))


def test_golden():
    golden(__file__, story()["fold_constants"], "time_proj", "time_embedding")
