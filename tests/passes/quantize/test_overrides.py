"""Overrides reach the specs in annotate, and mixed precision reaches the kernels."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.errors import RecipeError
from fxquant.graph import runner
from fxquant.graph.capture import capture
from fxquant.graph.lowered import LAYERS, arguments
from fxquant.graph.nodes import attribute, is_layer, module_path, note
from fxquant.graph.options import Options
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines
from fxquant.passes.quantize.annotate import annotate
from fxquant.quant.spec import QuantSpec
from fxquant.recipe import Override, Recipe
from fxquant.runtime.summary import summarise
from tests import models
from tests.toy import relative_error, story

BLOCK = "transformer.transformer_blocks.0"
W8A8 = Recipe.parse("w8a8-fast")
MIXED = W8A8.with_(
    compute_dtype="bfloat16",
    overrides=(
        Override("down_resnet", weight_bits=4),
        Override(f"{BLOCK}.attn1.to_q", activation_bits=4),
        Override(f"{BLOCK}.attn1.to_k", weight_bits=16),
        Override(f"{BLOCK}.attn2.*", weight_granularity="tensor", activation_symmetric=True),
        Override("up_resnet.conv1", keep_float=True),
        Override("conv_out", keep_float=False),
    ),
)


def decisions(*overrides: Override, recipe: Recipe = W8A8, **changes: Any) -> dict[str, Any]:
    """Quantisation notes of the toy's layers by path."""
    options = replace(story().options, recipe=recipe.with_(overrides=overrides, **changes))
    gm = annotate(runner.clone(story().before("annotate")), options=options)
    return {module_path(n): note(n, "quant") for n in gm.graph.nodes if is_layer(n)}


def bits(quant: dict[str, Any]) -> tuple[int, int]:
    return quant["weight"]["bits"], quant["input"]["bits"]


def test_a_pattern_names_a_layer() -> None:
    quant = decisions(Override("*.attn2.to_k", weight_bits=4, activation_bits=6))
    assert bits(quant[f"{BLOCK}.attn2.to_k"]) == (4, 6)
    assert bits(quant[f"{BLOCK}.attn2.to_v"]) == (8, 8)


def test_a_pattern_names_a_unit() -> None:
    quant = decisions(Override("down_resnet", weight_bits=4))
    four = {path for path, q in quant.items() if "weight" in q and bits(q) == (4, 8)}
    assert four == {f"down_resnet.{name}" for name in ("conv1", "conv2", "time_emb_proj")}


def test_the_later_override_wins_field_by_field() -> None:
    quant = decisions(
        Override("down_resnet.*", weight_bits=4, activation_symmetric=True),
        Override("down_resnet.conv2", weight_bits=6),
    )
    assert bits(quant["down_resnet.conv1"]) == (4, 8)
    assert bits(quant["down_resnet.conv2"]) == (6, 8)
    assert quant["down_resnet.conv2"]["input"]["symmetric"]
    assert not quant["up_resnet.conv1"]["input"]["symmetric"]


def test_overridden_weight_bits_bring_their_search() -> None:
    quant = decisions(Override("*.conv1", weight_bits=4))
    assert quant["down_resnet.conv1"]["weight"]["observer"] == "pnorm"
    assert quant["down_resnet.conv2"]["weight"]["observer"] == "absmax"
    quant = decisions(Override("*.conv1", weight_bits=8), recipe=Recipe.parse("w4a8-fast"))
    assert quant["down_resnet.conv1"]["weight"]["observer"] == "absmax"


def test_granularity() -> None:
    quant = decisions(Override("*.conv1", weight_granularity="tensor"))
    assert str(QuantSpec.from_json(quant["down_resnet.conv1"]["weight"])) == "i8/t"
    assert str(QuantSpec.from_json(quant["down_resnet.conv2"]["weight"])) == "i8/c0"


def test_keep_float_both_ways() -> None:
    quant = decisions(
        Override("*resnet*", keep_float=True),
        Override("down_resnet", keep_float=False),
        Override("conv_out", keep_float=False),
    )
    assert quant["up_resnet.conv1"] == {"float": "recipe keeps *resnet* float"}
    assert "weight" in quant["down_resnet.conv1"]
    assert "weight" in quant["conv_out"]
    assert quant["conv_in"] == {"float": "recipe keeps conv_in float"}


def test_only_equal_specs_share_a_quantiser() -> None:
    def index(path: str) -> int:
        return int(quant[f"{BLOCK}.{path}"]["input"]["index"])

    quant = decisions(
        Override("*.attn1.to_q", activation_bits=4), Override("*.attn2.to_k", weight_bits=4)
    )
    assert index("attn1.to_q") != index("attn1.to_k") == index("attn1.to_v")
    assert index("attn2.to_k") == index("attn2.to_v")


def test_patterns_that_match_nothing_are_all_named_with_near_modules() -> None:
    with pytest.raises(RecipeError) as caught:
        decisions(
            Override("transfomer.*", weight_bits=4),
            Override("conv_inn", weight_bits=4),
            keep_float=("conv_in", "downsampel.*"),
        )
    text = str(caught.value)
    assert re.search(r"'transfomer\.\*'; near: transformer\b", text)
    assert re.search(r"'conv_inn'; near: conv_in\b", text)
    assert re.search(r"'downsampel\.\*'; near: downsample\b", text)
    assert "dump MODEL --after annotate" in text


def test_default_patterns_need_not_match() -> None:
    assert "add_embedding.*" in W8A8.keep_float
    assert decisions()


def test_an_override_of_float_layers_says_that_it_does_nothing() -> None:
    with pytest.raises(RecipeError, match=r"'conv_in' has no effect.*recipe keeps conv_in float"):
        decisions(Override("conv_in", weight_bits=4))
    assert bits(decisions(Override("conv_in", weight_bits=4, keep_float=False))["conv_in"])[0] == 4
    assert bits(decisions(Override("conv_*", weight_bits=4), keep_float=["conv_in"])["conv_out"])


def test_a_fine_tune_gets_the_same_plan_and_another_model_a_refusal() -> None:
    recipe = W8A8.with_(overrides=(Override("transformer.*", weight_bits=4),))
    options, call = replace(story().options, recipe=recipe), models.calls("toy", 1)[0]
    other = capture(models.build("toy", seed=1), (), call).graph_module
    annotated = runner.run((*pipelines.PREPARE, *pipelines.OBSERVE), other, options,
                           stop_after="annotate")  # fmt: skip
    plan = {module_path(n): note(n, "quant") for n in annotated.graph.nodes if is_layer(n)}
    assert plan == decisions(*recipe.overrides)
    assert bits(plan["transformer.proj_in"]) == (4, 8)
    with pytest.raises(RecipeError, match=r"match no convolution.*\n.*\n  'down_blocks\.1\.\*'"):
        decisions(*recipe.overrides, Override("transformers", weight_bits=4),
                  Override("down_blocks.1.*", weight_bits=4))  # fmt: skip


class Shared(nn.Module):
    """Two linears that read one tensor through one transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        tokens = (sample * 2).flatten(2).transpose(1, 2)
        return self.q(tokens) * self.k(tokens) * timestep.reshape(-1, 1, 1)


def test_readers_of_one_layout_chain_may_differ() -> None:
    recipe = W8A8.with_(overrides=(Override("q", activation_bits=4),))
    call = (torch.randn(2, 16, 4, 4), torch.ones(()))
    gm = capture(Shared().eval(), call).graph_module
    gm = runner.run(pipelines.ALL, gm, Options(recipe, machine=Machine.named("x86-vnni")))
    layers = {module_path(n): arguments(n) for n in gm.graph.nodes if n.target in LAYERS}
    assert layers["q"]["x_index"] != layers["k"]["x_index"]
    assert arguments(layers["q"]["x"])["bits"] == 4
    assert arguments(layers["k"]["x"])["bits"] == 8


def test_mixed_precision_reaches_the_operators() -> None:
    layers = {
        module_path(n): arguments(n)
        for n in story(MIXED)["select_kernels"].graph.nodes
        if n.target in LAYERS
    }
    assert layers["down_resnet.conv1"]["kernel"] == "gemm_int4"
    assert layers["down_resnet.conv1"]["weight_bits"] == 4
    assert layers["downsample.conv"]["kernel"] == "gemm"
    assert "conv_out" in layers
    assert not {"conv_in", "up_resnet.conv1", f"{BLOCK}.attn1.to_k"} & set(layers)
    (simulated,) = (
        n for n in story(MIXED)["select_kernels"].graph.nodes
        if is_layer(n) and module_path(n) == f"{BLOCK}.attn1.to_k"
    )  # fmt: skip
    assert simulated.meta["val"].dtype == torch.float32  # bfloat16 would round the 16 bits away
    assert next(iter(simulated.users)).meta["val"].dtype == torch.bfloat16
    scale = attribute(
        story(MIXED)["select_kernels"], str(layers[f"{BLOCK}.attn2.to_q"]["weight_scale"].target)
    )
    assert scale.shape == (16,)
    assert scale.unique().numel() == 1
    row = story(MIXED).fake.table.row(0)
    assert row[layers[f"{BLOCK}.attn2.to_q"]["x_index"], 1] == 0
    assert row[layers["downsample.conv"]["x_index"], 1] != 0


def test_mixed_precision_computes_what_it_simulates() -> None:
    made = story(MIXED)
    wanted = made.run(made["capture"])
    simulated = relative_error(made.run(made["group_units"]), wanted)
    lowered = relative_error(made.run(made["select_kernels"]), wanted)
    assert 0.01 < simulated < 0.1
    assert lowered < 1.1 * simulated + 0.01  # bfloat16 in between


def test_the_summary_counts_each_precision() -> None:
    summary = summarise(story(MIXED)["select_kernels"], 1, "mixed", {}, {})
    assert summary.precision["w4a8"] == 3
    assert summary.precision["w8a4"] == 1
    assert summary.precision["w8a8"] > 10
    assert "3 layers w4a8" in str(summary)
