"""Capture: the graph computes what the eager model computes, at sizes the example never had."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import CallError, CaptureError
from fxquant.graph.capture import Captured, capture
from fxquant.graph.nodes import module_path, note
from tests import models

CHEAP = ("toy", "ddpm")
NAMES = [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in models.NAMES]


@functools.cache
def captured(name: str) -> tuple[nn.Module, Captured]:
    model = models.build(name)
    return model, capture(model, (), models.calls(name, n=1)[0])


def assert_equal_to_eager(name: str, call: dict[str, Any]) -> None:
    model, found = captured(name)
    with torch.no_grad():
        expected = model(**call).sample
        result = found.graph_module(*found.signature.flatten((), call))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def resized(name: str, batch: int, height: int, width: int, tokens: int = 7) -> dict[str, Any]:
    """A call of other sizes than the example's."""
    generator = torch.Generator().manual_seed(batch)
    call = models.calls(name, n=1, batch=batch)[0]
    channels = call["sample"].shape[1]
    call["sample"] = torch.randn(batch, channels, height, width, generator=generator)
    call["timestep"] = torch.randint(0, 1000, (batch,), generator=generator)
    if "encoder_hidden_states" in call:
        features = call["encoder_hidden_states"].shape[-1]
        call["encoder_hidden_states"] = torch.randn(batch, tokens, features, generator=generator)
    return call


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_eager_model(name: str) -> None:
    for call in models.calls(name, n=2, seed=5):
        assert_equal_to_eager(name, call)


@pytest.mark.parametrize("batch", [1, 2, 63, 64, 100])
@pytest.mark.parametrize("name", CHEAP)
def test_any_batch_size(name: str, batch: int) -> None:
    assert_equal_to_eager(name, resized(name, batch, 8, 8))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (32, 8), (40, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_any_height_and_width_the_levels_divide(name: str, height: int, width: int) -> None:
    assert_equal_to_eager(name, resized(name, 3, height, width))


@pytest.mark.parametrize("tokens", [1, 2, 8, 77, 154])
@pytest.mark.parametrize(
    "name", ["toy", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd", "sdxl"))]
)
def test_any_prompt_length(name: str, tokens: int) -> None:
    assert_equal_to_eager(name, resized(name, 2, 8, 16, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in models.NAMES if n not in CHEAP])
def test_batches_on_both_sides_of_the_upsamplers_branch(name: str) -> None:
    for batch in (1, 63, 64, 100):
        assert_equal_to_eager(name, resized(name, batch, 8, 8))


def sizes(found: Captured) -> list[set[str]]:
    """The symbolic sizes of every input."""
    inputs = [n for n in found.graph_module.graph.nodes if n.op == "placeholder"]
    return [{str(s) for s in n.meta["val"].shape if not isinstance(s, int)} for n in inputs]


@pytest.mark.parametrize("batch", [1, 64])
def test_the_example_fixes_no_size(batch: int) -> None:
    call = resized("toy", batch, 8, 8, tokens=1)
    found = capture(captured("toy")[0], (), call)
    assert [len(s) for s in sizes(found)] == [3, 1, 2]
    other = resized("toy", 5, 12, 6, tokens=9)
    with torch.no_grad():
        result = found.graph_module(*found.signature.flatten((), other))
        torch.testing.assert_close(result, captured("toy")[0](**other).sample)


@pytest.mark.parametrize("name", NAMES)
def test_every_call_knows_the_module_it_came_from(name: str) -> None:
    model, found = captured(name)
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    nodes = [n for n in found.graph_module.graph.nodes if n.op == "call_function"]
    assert nodes
    for node in nodes:
        stack = note(node, "stack")
        tensors = isinstance(node.meta["val"], (Tensor, tuple, list))
        assert stack or not tensors, f"{node.name} has no stack"
        for path, kind in stack or []:
            assert kinds[path] == kind


def test_layers_carry_the_path_of_their_own_module() -> None:
    model, found = captured("toy")
    layers = (nn.Conv2d, nn.Linear)
    expected = sorted(p for p, m in model.named_modules() if isinstance(m, layers))
    targets = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    nodes = found.graph_module.graph.nodes
    assert sorted(module_path(n) for n in nodes if n.target in targets) == expected


def test_blocks_enclose_their_layers_outside_in() -> None:
    _, found = captured("toy")
    stacks = [note(n, "stack") or [] for n in found.graph_module.graph.nodes]
    assert [
        ["", "ToyUNet"],
        ["transformer", "Transformer2DModel"],
        ["transformer.transformer_blocks.0", "BasicTransformerBlock"],
        ["transformer.transformer_blocks.0.attn1", "Attention"],
        ["transformer.transformer_blocks.0.attn1.to_q", "Linear"],
    ] in stacks


def test_whole_operators_and_no_guards_survive() -> None:
    nodes = captured("toy")[1].graph_module.graph.nodes
    names = {str(n.target) for n in nodes if n.op == "call_function"}
    whole = ("conv2d", "linear", "group_norm", "layer_norm", "scaled_dot_product_attention")
    assert {f"aten.{n}.default" for n in whole} <= names
    assert {n.op for n in nodes} == {"placeholder", "get_attr", "call_function", "output"}


def test_weights_are_shared_with_the_model_under_their_names() -> None:
    model, found = captured("toy")
    assert found.graph_module.get_parameter("conv_in.weight") is model.conv_in.weight


def test_the_model_is_left_unchanged() -> None:
    model = models.build("toy")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    capture(model, (), models.calls("toy", n=1)[0])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


class Small(nn.Module):
    """A dropout, which tells the modes apart, before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.conv = nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(self.dropout(sample))


X = torch.ones(2, 4, 8, 8)


def test_every_submodule_keeps_its_training_mode_and_the_graph_is_in_eval_mode() -> None:
    model = Small().train()
    model.conv.eval()
    found = capture(model, (X,))
    assert [m.training for m in (model, model.dropout, model.conv)] == [True, True, False]
    assert torch.equal(found.graph_module(X), model.conv(X))


def test_the_mode_comes_back_after_a_refusal_too() -> None:
    model = Unstable().train()
    with pytest.raises(CaptureError):
        capture(model, (X,))
    assert all(m.training for m in model.modules())


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line
            return x
        return -x


class Unstable(nn.Module):
    """A branch on a value, two modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(down_block_types=["a"])  # sizes are multiples of 1
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), Gate())

    def forward(self, sample: Tensor) -> Tensor:
        return self.block(sample)


def test_a_branch_on_a_value_is_refused_with_its_module_and_line() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Unstable(), (X,))
    lines = Path(__file__).read_text().splitlines()
    number = 1 + next(k for k, line in enumerate(lines) if line.endswith("# the line"))
    message = str(caught.value)
    assert "could not trace Unstable in module block.1 (Gate)" in message
    assert f"test_capture.py:{number} in forward" in message
    assert caught.value.__cause__ is not None


def test_a_function_is_no_module() -> None:
    with pytest.raises(CaptureError, match=r"expected a torch\.nn\.Module, got builtin_function"):
        capture(torch.relu, (X,))  # type: ignore[arg-type]


def test_a_call_that_does_not_fit_forward_is_refused() -> None:
    with pytest.raises(CallError, match="unknown argument 'latent'; forward takes sample"):
        capture(Small(), (), {"latent": X})


def test_several_outputs_come_back_in_order() -> None:
    class Pair(Small):
        def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.conv(sample), sample

    model = Pair()
    captured = capture(model, (X,))
    first, second = captured.graph_module(X)
    assert torch.equal(first, model.conv(X))
    assert torch.equal(second, X)


@pytest.mark.parametrize("other", [3, "word", object(), {}])
def test_outputs_that_are_no_tensors_are_refused_not_dropped(other: Any) -> None:
    class Counts(Small):
        def forward(self, sample: Tensor) -> Any:
            return other if other == {} else (self.conv(sample), other)

    with pytest.raises(CaptureError, match=r"forward returns a (tuple|dict) with"):
        capture(Counts(), (X,))


def test_a_tuple_of_one_is_its_tensor() -> None:
    class Single(Small):
        def forward(self, sample: Tensor) -> tuple[Tensor]:  # type: ignore[override]
            return (self.conv(sample),)

    model = Single()
    assert torch.equal(capture(model, (X,)).graph_module(X), model.conv(X))


def on_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: on_meta(v) for k, v in value.items()}
    return value.to("meta")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), [("sd", 859_520_964), ("sdxl", 2_567_463_684)])
def test_published_widths_are_captured_without_weights(name: str, parameters: int) -> None:
    config = models.config(name, reduced=False)
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    found = capture(model, (), on_meta(models.calls(model, n=1)[0]))
    weights = list(found.graph_module.parameters())
    assert sum(w.numel() for w in weights) == parameters
    assert {w.device.type for w in weights} == {"meta"}
    assert [len(s) for s in sizes(found)][:3] == [3, 1, 2]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.conv(sample)
        return hidden if hidden.mean() > 0 else -hidden


def test_a_branch_on_values_is_refused_without_printing_the_graph(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ in forward.*data-dependent"):
        capture(Branching().eval(), (torch.randn(2, 4, 8, 8),))
    assert "def forward" not in capfd.readouterr().err


class ThroughData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.conv(sample)
        hidden.data[:, 0] = 1
        sample.data.mul_(2)
        return hidden + self.conv.weight.data.sum() + sample.mean()


def test_writes_through_data_are_seen() -> None:
    model, sample = ThroughData().eval(), torch.randn(2, 4, 8, 8)
    found = capture(model, (sample,))
    expected = model(sample.clone())
    torch.testing.assert_close(found.graph_module(sample.clone()), expected)


class AssignsData(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        hidden = sample * 2
        hidden.data = hidden + 1
        return hidden


def test_data_that_is_assigned_is_refused_by_line() -> None:
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ in forward.*\.data.*\n.*copy_"):
        capture(AssignsData().eval(), (torch.randn(2, 4, 8, 8),))


class Unshuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, sample: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(F.pixel_unshuffle(sample, 2)), 2)


def test_what_is_unshuffled_takes_every_even_size() -> None:
    model = Unshuffled()
    found = capture(model, (torch.randn(2, 4, 8, 8),))
    assert found.signature.limits.shapes == (("B", 4, "2*h", "2*w"),)
    other = torch.randn(3, 4, 6, 10)
    torch.testing.assert_close(found.graph_module(other), model(other))
