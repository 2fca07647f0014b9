"""mark_timestep_only marks the time path and nothing that sees the sample."""

from __future__ import annotations

from fxquant.graph.nodes import note
from tests.toy import golden, story


def test_marks():
    gm = story()["mark_timestep_only"]
    marked = {n.name for n in gm.graph.nodes if note(n, "timestep_only")}
    assert {"linear", "linear_1", "linear_2"} <= marked, "time MLP and the block's projection of it"
    assert not marked & {"conv2d", "conv2d_1", "add", "linear_3"}, "these see the sample"
    assert not any(n.op != "call_function" for n in gm.graph.nodes if note(n, "timestep_only"))


def test_class_labels_are_no_timestep():
    from fxquant.graph.capture import capture
    from fxquant.graph.runner import run
    from fxquant.passes import pipelines
    from tests.models import build, calls

    gm = capture(build("sdxl"), (), calls("sdxl", 1, 2, 0)[0]).graph_module
    gm = run(pipelines.PREPARE, gm, story().options)
    marked = {
        str(n.meta["custom"]["fxquant"]["stack"][-1][0])
        for n in gm.graph.nodes
        if note(n, "timestep_only")
    }
    assert "time_embedding.linear_2" in marked
    assert not any(path.startswith("add_embedding") for path in marked), (
        "depends on the text and sizes"
    )
    assert not any(path.endswith("time_emb_proj") for path in marked), (
        "reads the sum with add_embedding"
    )


def test_golden():
    golden(__file__, story()["mark_timestep_only"], "time_proj", "time_embedding", "down_resnet")
