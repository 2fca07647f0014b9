"""Block types and flags beyond the published configurations: captured, lowered, right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fxquant.calibration.calls import read_calls
from fxquant.calibration.example import example_call
from fxquant.compiler import bind, fake_quantise
from fxquant.evaluate.op_by_op import compare
from fxquant.graph import runner
from fxquant.graph.options import Options
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests.toy import relative_error

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
CROSS = {"cross_attention_dim": 32, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "scale and shift by time": (
        UNet2DModel,
        {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
        },
    ),
    "resnet down- and upsampling": (
        UNet2DModel,
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        },
    ),
    "FIR skips and Fourier timesteps": (
        UNet2DModel,
        {
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "time_embedding_type": "fourier",
            "center_input_sample": True,
        },
    ),
    "learned timesteps": (
        UNet2DModel,
        {**PLAIN, "time_embedding_type": "learned", "num_train_timesteps": 1000},
    ),
    "odd channel counts": (
        UNet2DModel,
        {
            "block_out_channels": (24, 40),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "added-key attention": (
        UNet2DConditionModel,
        {
            **CROSS,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
        },
    ),
    "text and class": (
        UNet2DConditionModel,
        {
            "cross_attention_dim": 32,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "num_class_embeds": 10,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_operator_agrees_with_fake_quant(name):
    kind, config = CASES[name]
    torch.manual_seed(0)
    model = kind(**{**SMALL, **config}).eval()
    signature, calls = read_calls([example_call(model, seed=k) for k in range(2)], model)
    options = Options(Recipe.parse("w8a8-fast").with_(compute_dtype="float32"))
    fake = fake_quantise(model, signature, calls, options)
    lowered, _ = bind(runner.run(pipelines.LOWER, fake.graph, options), options)
    for difference in compare(fake.graph, lowered, calls[0], fake.table.row(0)):
        assert difference.error <= (1 if difference.integer else 1e-5), difference
    with torch.no_grad():
        truth = model(**signature.unflatten(calls[0])).sample
        errors = [
            relative_error(fake(calls[0]), truth),
            relative_error(lowered(*calls[0], fake.table.row(0)), truth),
        ]
    assert 0 < errors[1] <= 1.1 * errors[0]
