"""observers_to_fake_quant simulates the integers of activations and weights."""

from __future__ import annotations

import torch

from fxquant.graph.nodes import attribute
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from tests.toy import golden, relative_error, story


def test_observers_are_gone_and_the_result_is_near_float():
    after = story()["observers_to_fake_quant"]
    assert not [n for n in after.graph.nodes if n.op == "call_module"]
    assert 0 < relative_error(story().run(after), story().run(story()["annotate"])) < 0.05


def test_weights_have_a_scale_per_output_channel():
    gm = story()["observers_to_fake_quant"]
    for node in gm.graph.nodes:
        if node.target is fake_quantize_weight:
            weight, scale = (attribute(gm, str(a.target)) for a in node.args[:2])
            assert scale.shape == (weight.shape[0],)
            torch.testing.assert_close(scale * 127, weight.flatten(1).abs().amax(1))


def test_gradients_reach_weights_and_scales():
    gm, values = (
        story()["observers_to_fake_quant"],
        story().fake.table.values.clone().requires_grad_(),
    )
    gm(*story().calls[0], values[0]).square().sum().backward()
    assert values.grad is not None
    assert (values.grad[0, :, 0] != 0).sum() > len(values[0]) // 2
    assert sum(n.target is fake_quantize for n in gm.graph.nodes) == values.shape[1]


def test_golden():
    golden(__file__, story()["observers_to_fake_quant"], "down_resnet", "downsample")
