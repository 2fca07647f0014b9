"""merge_layers calls a layer once for one input, and leaves everything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.graph.nodes import is_layer
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from tests.toy import golden, relative_error, story, targets


class Twice(nn.Module):
    """One layer called four times: twice with equal inputs, computed apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor) -> Tensor:
        same = self.layer(sample.exp() * 2) + self.layer(sample.exp() * 2)
        return same + self.layer(sample.exp() * 3) + self.layer(sample.exp() * 2.0 + 1)


def prepared(model: nn.Module, sample: Tensor, **kwargs: object) -> torch.fx.GraphModule:
    gm = capture(model, (sample,)).graph_module
    return run(pipelines.PREPARE, gm, story().options, **kwargs)  # type: ignore[arg-type]


def test_equal_calls_become_one() -> None:
    model, sample = Twice(), torch.randn(2, 3, 4, 4)
    gm = prepared(model, sample)
    assert sum(is_layer(node) for node in gm.graph.nodes) == 3
    whole = prepared(model, sample, skip=["merge_layers"])
    assert sum(is_layer(node) for node in whole.graph.nodes) == 4
    assert len(targets(gm)) == len(targets(whole)) - 3, "the second input's way is still there"
    with torch.no_grad():
        assert relative_error(gm(sample), model(sample)) < 1e-6


def test_other_equal_values_stay() -> None:
    """Blocks that activate the same time embedding keep an activation each."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, sample: Tensor) -> Tensor:
            return self.a(nn.functional.silu(sample)) + self.b(nn.functional.silu(sample))

    gm = prepared(Model(), torch.randn(2, 3, 4, 4))
    assert targets(gm).count("aten.silu.default") == 2


def test_random_values_are_no_two_alike() -> None:
    class Model(Twice):
        def forward(self, sample: Tensor) -> Tensor:
            noise = [torch.rand_like(sample) for _ in range(2)]
            return self.layer(sample + noise[0]) + self.layer(sample + noise[1])

    gm = prepared(Model(), torch.randn(2, 3, 4, 4))
    assert sum(is_layer(node) for node in gm.graph.nodes) == 2


def test_the_toy_has_nothing_to_merge() -> None:
    assert targets(story()["merge_layers"]) == targets(story().before("merge_layers"))


def test_golden() -> None:
    golden(__file__, story()["merge_layers"], "time_proj", "time_embedding")
