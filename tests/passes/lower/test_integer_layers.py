"""integer_layers replaces simulated by real integers, without changing the result."""

from __future__ import annotations

import torch

from fxquant.graph.lowered import LAYERS, arguments
from fxquant.graph.nodes import attribute
from fxquant.kernels.int4 import unpack_int4
from fxquant.recipe import Recipe
from tests.toy import golden, relative_error, story


def test_result_is_the_fake_quantised_one():
    before, after = story().before("integer_layers"), story()["integer_layers"]
    assert relative_error(story().run(after), story().run(before)) < 0.02


def test_weights_are_int8_and_decode_to_the_simulated_ones():
    gm, float_weight = story()["integer_layers"], story().model.down_resnet.conv1.weight
    q, scale = (attribute(gm, f"down_resnet.conv1.{n}") for n in ("weight", "weight_scale"))
    assert q.dtype == torch.int8
    assert q.abs().max() == 127
    assert (
        (q * scale.view(-1, 1, 1, 1) - float_weight).abs() <= scale.view(-1, 1, 1, 1) / 2 * 1.001
    ).all()


def test_the_original_keeps_its_weights():
    assert story().model.down_resnet.conv1.weight.dtype == torch.float32
    assert attribute(story()["group_units"], "down_resnet.conv1.weight").dtype == torch.float32


def test_asymmetric_padding_moves_into_the_convolution():
    conv = next(n for n in story()["integer_layers"].graph.nodes if n.name == "conv2d_3")
    assert arguments(conv)["padding"] == [0, 1, 0, 1]
    assert arguments(conv)["x"].name == "fq_3"


def test_int4_weights_are_packed():
    gm = story(Recipe.parse("w4a8-fast"))["integer_layers"]
    layer = next(
        n
        for n in gm.graph.nodes
        if n.target in LAYERS and "conv1" in str(arguments(n)["weight"].target)
    )
    packed = attribute(gm, str(arguments(layer)["weight"].target))
    assert packed.dtype == torch.uint8
    assert packed.shape == (16, 16 * 9 // 2)
    q = unpack_int4(packed, 16 * 9)
    assert q.min() >= -8
    assert q.max() <= 7


def test_wider_activations_stay_simulated():
    gm = story(Recipe.parse("w8a8-fast").with_(activation_bits=12))["select_kernels"]
    assert not any(n.target in LAYERS for n in gm.graph.nodes)


def test_golden():
    golden(__file__, story()["integer_layers"], "down_resnet", "downsample")
