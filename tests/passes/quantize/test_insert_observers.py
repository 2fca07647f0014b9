"""insert_observers watches every annotated edge, at its root."""

from __future__ import annotations

from fxquant.calibration.observe import observed_edges
from tests.toy import golden, relative_error, story


def test_one_observer_a_quantiser_and_the_result_stays():
    before, after = story().before("insert_observers"), story()["insert_observers"]
    observers = [n for n in after.graph.nodes if n.op == "call_module"]
    assert len(observers) == story().fake.table.values.shape[1]
    assert relative_error(story().run(after), story().run(before)) == 0


def test_observers_sit_above_layout_operators_and_padding():
    gm = story()["insert_observers"]
    watched = {n.args[0].name for n in gm.graph.nodes if n.op == "call_module"}
    assert "add_1" in watched, "the value before the asymmetric pad"
    assert "pad" not in watched
    assert "scaled_dot_product_attention" in watched, "before transpose and reshape"


def test_observers_saw_the_calibration_calls():
    edges = observed_edges(story()["insert_observers"])
    assert all(sum(edge.seen) >= 3 for edge in edges)
    assert all(edge.rows[0].range()[0] <= edge.rows[0].range()[1] for edge in edges)


def test_golden():
    golden(
        __file__,
        story()["insert_observers"],
        "down_resnet",
        "downsample",
        "transformer.transformer_blocks.0.attn",
    )
