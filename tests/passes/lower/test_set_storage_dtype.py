"""set_storage_dtype: integers as the device multiplies them, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxquant.graph import runner
from fxquant.graph.dump import dump
from fxquant.graph.lowered import PRODUCTS, arguments, is_op
from fxquant.graph.runner import clone
from fxquant.passes.lower.set_storage_dtype import set_storage_dtype
from fxquant.passes.pipelines import BIND
from tests.toy import golden, story


def written(gm):
    return {n.name: n.meta["val"].dtype for n in gm.graph.nodes if is_op(n)}


def test_a_cpu_keeps_what_lowering_wrote():
    before = story()["set_compute_dtype"]
    after = set_storage_dtype(clone(before), options=story().options)
    assert dump(after) == dump(before)


def test_a_gpu_stores_signed_integers():
    options = replace(story().options, device="cuda")
    before = written(story()["set_compute_dtype"])
    gm = set_storage_dtype(clone(story()["set_compute_dtype"]), options=options)
    after = written(gm)
    assert torch.uint8 in before.values()
    for name, dtype in before.items():
        assert after[name] == (torch.int8 if dtype == torch.uint8 else dtype), name
    for node in gm.graph.nodes:
        if node.target in PRODUCTS and arguments(node)["out_index"] >= 0:
            assert arguments(node)["out_dtype"] == torch.int8


def test_signed_integers_compute_the_same():
    """By the reference, which takes either storage."""
    options = replace(story().options, backend="reference")
    signed = replace(options, device="cuda", recipe=options.recipe.with_(compute_dtype="float32"))
    unsigned = runner.run(BIND, story()["fuse_requantize"], options)
    expected = story().run(unsigned)
    found = story().run(runner.run(BIND, story()["fuse_requantize"], signed))
    assert torch.equal(found, expected)


def test_golden():
    options = replace(story().options, device="cuda")
    gm = set_storage_dtype(clone(story()["set_compute_dtype"]), options=options)
    golden(__file__, gm, "down_resnet")
