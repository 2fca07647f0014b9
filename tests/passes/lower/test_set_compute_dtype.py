"""set_compute_dtype moves the float parts to bfloat16, and leaves float32 alone."""

from __future__ import annotations

import torch

from fxquant.graph.lowered import LAYERS, arguments
from fxquant.graph.nodes import attribute
from fxquant.recipe import Recipe
from tests.toy import golden, relative_error, story

BF16 = Recipe.parse("w8a8-fast").with_(compute_dtype="bfloat16")


def test_layers_write_and_float_layers_compute_bfloat16():
    gm = story(BF16)["set_compute_dtype"]
    for node in gm.graph.nodes:
        if node.target in LAYERS and arguments(node)["out_index"] < 0:
            assert node.meta["val"].dtype == torch.bfloat16, node.name
    assert attribute(gm, "conv_in.weight").dtype == torch.bfloat16
    assert attribute(gm, "down_resnet.norm1.weight").dtype == torch.float32, (
        "norms compute in float32"
    )


def test_the_result_has_the_models_dtype_and_is_close():
    gm = story(BF16)["set_compute_dtype"]
    result = story(BF16).run(gm)
    assert result.dtype == torch.float32
    assert relative_error(result, story().run(story()["strip_noops"])) < 0.05


def test_timestep_sinusoid_stays_float32():
    gm = story(BF16)["set_compute_dtype"]
    sinusoid = next(n for n in gm.graph.nodes if n.name == "cat")
    assert sinusoid.meta["val"].dtype == torch.float32


def test_float32_needs_no_cast():
    assert not [
        n for n in story()["set_compute_dtype"].graph.nodes if n.target is torch.ops.aten.to.dtype
    ]


def test_golden():
    golden(
        __file__,
        story(BF16)["set_compute_dtype"],
        "time_embedding",
        "conv_in",
        "down_resnet",
        "conv_out",
    )
