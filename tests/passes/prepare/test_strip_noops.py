"""strip_noops removes exactly what computes nothing."""

from __future__ import annotations

import torch

from fxquant.graph.capture import capture
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from tests.toy import golden, relative_error, story, targets

GONE = (
    "aten.dropout.default",
    "aten.view.default",
    "aten._assert_tensor_metadata.default",
    "aten.contiguous.default",
)


def test_noops_go_and_the_result_stays():
    before, after = story().before("strip_noops"), story()["strip_noops"]
    assert any(t in GONE for t in targets(before))
    assert not any(t in GONE for t in targets(after))
    assert relative_error(story().run(after), story().run(before)) < 1e-6


def test_arithmetic_that_computes_something_stays():
    class Model(torch.nn.Module):
        def forward(self, sample):
            return (sample * 1 / 1 + 0) * 2 + sample[:, 1:].sum()

    gm = capture(Model(), (torch.ones(2, 3, 4, 4),)).graph_module
    gm = run(pipelines.PREPARE, gm, story().options, stop_after="strip_noops")
    assert targets(gm) == [
        "aten.mul.Tensor",
        "aten.slice.Tensor",
        "aten.sum.default",
        "aten.add.Tensor",
    ]


def test_golden():
    golden(
        __file__,
        story()["strip_noops"],
        "down_resnet",
        "downsample",
        "transformer.transformer_blocks.0.attn1",
    )
