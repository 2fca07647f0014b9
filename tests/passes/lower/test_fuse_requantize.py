"""fuse_requantize lets a layer write integers when only a quantize reads it."""

from __future__ import annotations

import torch

from fxquant.graph.lowered import LAYERS, arguments, ops
from tests.toy import golden, relative_error, story


def test_the_layer_writes_integers():
    gm = story()["fuse_requantize"]
    writers = [n for n in gm.graph.nodes if n.target in LAYERS and arguments(n)["out_index"] >= 0]
    assert [n.name for n in writers] == ["fq_11", "fq_12"], (
        "ff.net.2 reads the GEGLU, the transformer's output projection reads ff.net.2"
    )
    assert all(n.meta["val"].dtype == torch.uint8 for n in writers)
    assert arguments(writers[0])["activation"] == "geglu"
    assert relative_error(story().run(gm), story().run(story().before("fuse_requantize"))) < 0.02


def test_attention_writes_integers():
    gm = story()["fuse_requantize"]
    attention = [n for n in gm.graph.nodes if n.target is ops.attention.default]
    assert attention
    assert all(arguments(n)["out_index"] >= 0 for n in attention), "to_out is all that reads it"


def test_a_layer_with_a_second_reader_keeps_its_float_result():
    gm = story()["fuse_requantize"]
    quantised = [n for n in gm.graph.nodes if n.target is ops.quantize.default]
    residual = next(n for n in quantised if arguments(n)["x"].name == "add_1")
    assert len(arguments(residual)["x"].users) > 1


def test_golden():
    golden(
        __file__,
        story()["fuse_requantize"],
        "transformer.transformer_blocks.0",
        "transformer.proj_out",
    )
