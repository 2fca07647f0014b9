"""fuse_producers leaves no float tensor between a norm and its integer reader."""

from __future__ import annotations

import torch

from fxquant.graph.lowered import ops
from tests.toy import golden, relative_error, story, targets


def test_every_norm_and_attention_is_lowered():
    gm = story()["fuse_producers"]
    for name in (
        "group_norm",
        "layer_norm",
        "silu",
        "gelu",
        "upsample_nearest2d",
        "scaled_dot_product_attention",
    ):
        left = [t for t in targets(gm) if t.startswith(f"aten.{name}.")]
        assert len(left) == (1 if name == "silu" else 0), (
            f"{name}: only the time MLP's SiLU is float"
        )
    assert relative_error(story().run(gm), story().run(story().before("fuse_producers"))) < 0.02


def test_no_float_tensor_between_norm_and_layer():
    gm = story()["fuse_producers"]
    norms = [n for n in gm.graph.nodes if n.target is ops.group_norm_silu_quantize.default]
    assert [n.meta["val"].dtype for n in norms].count(torch.uint8) == len(norms) - 1
    assert norms[-1].meta["val"].dtype == torch.float32, "conv_norm_out feeds the float conv_out"


def test_geglu_and_upsample_fuse():
    found = targets(story()["fuse_producers"])
    assert "fxquant.geglu_quantize.default" in found
    assert "fxquant.upsample_quantize.default" in found
    assert "aten.chunk.default" not in found


def test_golden():
    golden(
        __file__,
        story()["fuse_producers"],
        "down_resnet",
        "transformer.transformer_blocks.0",
        "upsample",
    )
