"""fuse_epilogues moves adds and activations into the layer before them."""

from __future__ import annotations

from fxquant.graph.lowered import LAYERS, arguments
from tests.toy import golden, relative_error, story


def by_name(gm, name):
    return arguments(next(n for n in gm.graph.nodes if n.name == name))


def test_time_embedding_and_residual_join_the_convolutions():
    gm = story()["fuse_epilogues"]
    assert by_name(gm, "add")["channel_add"].name == "linear_2"
    assert by_name(gm, "add_1")["residual"].name == "conv2d"
    assert relative_error(story().run(gm), story().run(story().before("fuse_epilogues"))) < 0.02


def test_of_two_added_layers_the_later_takes_the_sum():
    gm = story()["fuse_epilogues"]
    assert by_name(gm, "add_6")["residual"].name == "conv2d_8"
    assert arguments(next(n for n in gm.graph.nodes if n.name == "conv2d_8"))["residual"] is None


def test_a_value_with_other_readers_is_not_taken():
    gm = story()["fuse_epilogues"]
    for node in gm.graph.nodes:
        if node.target in LAYERS and arguments(node)["residual"] is not None:
            assert arguments(node)["residual"] is not node
    assert any(n.name == "linear_11" for n in gm.graph.nodes), "GEGLU's projection has two readers"


def test_golden():
    golden(__file__, story()["fuse_epilogues"], "down_resnet", "up_resnet")
