"""Convolutions of other dimensions and named paddings run on conv2d's integer kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.nodes import CONV2D, calls
from fxquant.graph.runner import run
from fxquant.passes import pipelines
from tests.passes.small import Model, assert_near, compiled, prepared
from tests.toy import golden, story, targets

C1, C2, C3 = (partial(kind, 8, 12) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
LINE, IMAGE, VIDEO = (8, 11), (8, 7, 6), (8, 4, 6, 5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (C1(3, padding=1), LINE),
        (C1(4, stride=2, padding=1), LINE),
        (C1(3, padding=2, dilation=2), LINE),
        (C1(4, padding="same"), LINE),
        (C1(3, padding="same", dilation=3, bias=False), LINE),
        (C1(3, padding=1, padding_mode="circular"), LINE),
        (C2(3, padding="same"), IMAGE),
        (C2((4, 3), padding="same", dilation=(1, 2)), IMAGE),
        (C2(3, padding="valid"), IMAGE),
        (C3(3, padding=1), VIDEO),
        (C3((1, 3, 3), padding=(0, 1, 1)), VIDEO),
        (C3((1, 2, 2), stride=(1, 2, 2)), VIDEO),
        (C3((3, 1, 1), padding=(1, 0, 0)), VIDEO),
        (C3((3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)), VIDEO),
        (C3(1), VIDEO),
        (C3((1, 3, 3), stride=(2, 1, 1)), VIDEO),
        (C3((2, 3, 3), stride=2, dilation=(2, 1, 1), padding=(1, 1, 1)), VIDEO),
        (C3((2, 3, 2), padding="same"), VIDEO),
    ],
)
def test_the_result_is_the_same(layer: nn.Module, sizes: tuple[int, ...]) -> None:
    gm = prepared(layer, torch.randn(3, *sizes))
    assert [n.target for n in gm.graph.nodes if "conv" in str(n.target)] == [CONV2D]


def test_a_grouped_one_of_one_dimension_too_and_one_of_three_stays() -> None:
    assert len(list(calls(prepared(C1(3, groups=4), torch.randn(2, *LINE)), CONV2D))) == 1
    assert "aten.conv3d.default" in targets(prepared(C3(3, groups=4), torch.randn(2, *VIDEO)))


def test_audio_runs_in_integers_and_is_saved(tmp_path) -> None:
    model = Model(
        lambda m, x: m.b(F.silu(m.norm(m.a(x)))),
        a=nn.Conv1d(8, 16, 3, padding="same"), norm=nn.GroupNorm(4, 16),
        b=nn.Conv1d(16, 8, 4, stride=2, padding=1),
    )  # fmt: skip
    x = torch.randn(4, 8, 20)
    served = compiled(model, x, strict=True)
    assert served.summary.precision == {"w8a8": 2}
    served.save_pretrained(tmp_path)
    assert_near(fxquant.load(tmp_path), model, x)


def test_video_runs_in_integers() -> None:
    model = Model(
        lambda m, x: m.point(F.silu(m.time(F.silu(m.frame(F.silu(m.cube(x))))))),
        cube=nn.Conv3d(8, 16, 3, padding=1),
        frame=nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1)),
        time=nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)), point=nn.Conv3d(16, 8, 1),
    )  # fmt: skip
    served = compiled(model, torch.randn(4, 8, 4, 16, 16), strict=True)
    assert served.summary.precision == {"w8a8": 4}


def test_golden() -> None:
    model = nn.Conv1d(4, 8, 3, padding=1)
    gm = capture(model.eval(), (torch.randn(2, 4, 6),)).graph_module
    golden(
        __file__, run(pipelines.PREPARE, gm, story().options, stop_after="convolutions_to_conv2d")
    )
