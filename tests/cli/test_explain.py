"""fxquant explain: every node has an answer, for people and for scripts."""

from __future__ import annotations

import json
import re
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from fxquant import assets, cli
from fxquant.cli.explain import Plan, make_plan, plan_of
from fxquant.graph import runner
from fxquant.graph.lowered import is_op
from fxquant.graph.options import Options
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines
from fxquant.recipe import Override, Recipe
from tests import models
from tests.toy import story


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """MODEL is the toy, captured once for all tests; the machine is x86-vnni unless asked."""

    def plan(model: object, options: Options) -> Plan:
        made = story(options.recipe)
        bound = runner.run(pipelines.BIND, made["fuse_requantize"], options)
        return plan_of(bound, [t[:1] for t in made.calls[0]], options)

    monkeypatch.setattr("fxquant.cli.explain.load_model", lambda name: name)
    monkeypatch.setattr("fxquant.cli.explain.make_plan", plan)
    monkeypatch.setattr("fxquant.cli.explain.detect", lambda device: Machine.named("x86-vnni"))
    return "toy"


def made(model: nn.Module, recipe: str = "w8a8-fast") -> Plan:
    return make_plan(model, Options(Recipe.parse(recipe), Machine.named("x86-vnni")))


def assert_complete(plan: Plan) -> None:
    """A kernel or a reason for every node, and no operator that runs on the reference."""
    for node, explained in plan.nodes.items():
        assert bool(explained.kernel) != bool(explained.reason), node.name
        assert explained.kernel != "reference"
    assert not plan.fallbacks
    assert sum(is_op(node) for node in plan.nodes) > 100


def test_digits_is_explained_completely() -> None:
    model = assets.load_digits_unet()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    plan = made(model)
    assert_complete(plan)
    told = [e for e in plan.nodes.values() if e.op.endswith((".conv2d", ".linear"))]
    assert len(told) == len(layers)
    assert plan.coverage[0].precision == "w8a8"
    assert plan.coverage[0].macs > 0.95 * sum(row.macs for row in plan.coverage)


@pytest.mark.slow  # 20 s: the published widths, as shapes without values
def test_stable_diffusion_1_is_explained_completely() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(models.config("sd", reduced=False))
    plan = made(unet.eval(), "w4a8-fast")
    assert_complete(plan)
    rows = {row.precision: row for row in plan.coverage}
    assert rows["w4a8"].parameters > 0.99 * 859_520_964  # Stable Diffusion 1's UNet
    assert sum(row.parameters for row in rows.values()) == pytest.approx(859_520_964, rel=1e-4)
    assert rows["w4a8"].macs == pytest.approx(338.5e9, rel=1e-3)


def test_tables(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", toy, "--machine", "arm64"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("toy, recipe w8a8-fast, backend auto, on arm64\n")
    assert "onednn: it runs on x86_64, this is arm64" in " ".join(out.replace("│", " ").split())
    assert "recipe keeps conv_in float" in out
    assert "coverage, multiply-accumulates" in out
    assert "operators fall back to a slower path than planned" in out


def test_every_node_in_a_row(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", toy, "--machine", "x86-vnni", "--nodes"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "  up_resnet.conv_shortcut  " in line]
    assert any(re.match(r"w8a8 +%\w+  fxquant.conv2d gemm  ", line) for line in lines)
    assert "nothing falls back" in out


def test_one_node_shows_every_kernel(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", toy, "downsample", "--machine", "x86-vnni"]) == 0
    out = capsys.readouterr().out.splitlines()
    conv = next(k for k, text in enumerate(out) if "fxquant.conv2d(" in text)
    assert out[conv + 1 : conv + 12] == [
        "  module downsample.conv",
        "  precision w8a8, 2,320 parameters, 36,864 multiply-accumulates an image",
        "  kernel gemm: taken",
        "  kernel gemm_int4: not needed: gemm comes before it",
        "  kernel onednn: not needed: gemm comes before it",
        "  kernel onednn_int4: not needed: gemm comes before it",
        "  kernel cutlass: not needed: gemm comes before it",
        "  kernel cutlass_w4a4: not needed: gemm comes before it",
        "  kernel cutlass_int4: not needed: gemm comes before it",
        "  kernel int_mm: not needed: gemm comes before it",
        "  kernel reference: not needed: gemm comes before it",
    ]
    assert cli.main(["explain", toy, "%conv2d", "--machine", "x86-vnni"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("%conv2d: ")
    assert out[-1] == "  recipe keeps conv_in float"


def test_json_is_complete(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", toy, "--machine", "cuda-sm90", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["machine"]["cuda"] == "9.0"
    assert Recipe.from_json(told["recipe"]) == Recipe()
    assert told["fallbacks"] == {}
    for node in told["nodes"]:
        taken = [c["kernel"] for c in node["considered"] if c["verdict"] == "taken"]
        assert taken == ([node["kernel"]] if node["kernel"] else [])
        assert node["kernel"] or node["reason"]
    macs = sum(node["macs"] for node in told["nodes"])
    assert macs == sum(row["macs"] for row in told["coverage"]) > 0


def test_a_recipe_file(toy: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    Recipe(overrides=(Override("down_resnet", weight_bits=4),)).save(path)
    assert cli.main(["explain", toy, "--recipe", str(path), "--json"]) == 0
    assert "w4a8" in {row["precision"] for row in json.loads(capsys.readouterr().out)["coverage"]}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--recipe", "w8a9-fast"], "RecipeError", "unknown bits 'w8a9'. Did you mean 'w8a8'?"),
        (["--recipe", "edadm:w8a8-fast"], "RecipeError", "Did you mean 'eda_dm'?"),
        (["--recipe", "w8a8-fats"], "RecipeError", "unknown effort 'fats'. Did you mean 'fast'?"),
        (["--recipe", "none.json"], "RecipeError", "no recipe could be read from none.json"),
        (["--backend", "x68"], "BackendError", "unknown backend 'x68'. Did you mean 'x86'?"),
        (["mid_blok"], "ModelError", "toy has no node or module 'mid_blok' after lowering."),
        (["downsampl"], "ModelError", "Did you mean 'downsample"),
        (
            ["--strict", "--machine", "x86-vnni-no-compiler"],
            "FallbackError",
            "Install a C++ compiler",
        ),
    ],
)
def test_refusals_end_with_2(
    toy: str,
    arguments: list[str],
    error: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["explain", toy, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"fxquant: {error}: " in err
    assert words in err


def test_strict_is_content_where_all_is_planned(
    toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", toy, "--strict", "--machine", "x86-vnni"]) == 0
    assert capsys.readouterr().out
