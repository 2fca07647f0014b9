"""split_shortcut turns the 1x1 convolution over cat(h, skip) into two."""

from __future__ import annotations

from fxquant.graph.nodes import CONV2D, calls
from fxquant.recipe import Recipe
from tests.toy import golden, relative_error, story

SPLIT = Recipe.parse("w8a8-fast").with_(split_shortcut=True)


def test_off_by_recipe():
    assert len(list(calls(story()["split_shortcut"], CONV2D))) == len(
        list(calls(story().before("split_shortcut"), CONV2D))
    )


def test_split_computes_the_same():
    split = story(SPLIT)
    before, after = split.before("split_shortcut"), split["split_shortcut"]
    assert len(list(calls(after, CONV2D))) == len(list(calls(before, CONV2D))) + 1
    assert relative_error(split.run(after), split.run(before)) < 1e-5


def test_each_half_has_its_own_quantiser_and_both_join_in_one_sum():
    from fxquant.graph.lowered import arguments, is_op
    from fxquant.graph.nodes import module_path

    lowered = story(SPLIT)["select_kernels"]
    halves = [n for n in lowered.graph.nodes if is_op(n) and "conv_shortcut" in str(module_path(n))]
    layers = [n for n in halves if "conv2d" in str(n.target)]
    assert len({arguments(n)["x_index"] for n in layers}) == 2
    assert sum(arguments(n)["residual"] is not None for n in layers) >= 1
    assert relative_error(story(SPLIT).run(lowered), story().run(story()["strip_noops"])) < 0.05


def test_golden():
    golden(__file__, story(SPLIT)["split_shortcut"], "up_resnet")
