"""The command line: what each verb prints, its exit status, and every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from fxquant import cli
from fxquant._version import __version__
from fxquant.cli import main
from fxquant.passes import pipelines
from tests import models

SMALL = {
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "sample_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CIFAR DDPM cut down to one level, saved as diffusers saves a model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "ddpm"
    UNet2DModel.from_config({**models.config("ddpm"), **SMALL}).save_pretrained(path)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command line that ends with status 2 and prints nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_passes_lists_every_pass_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    listed = re.findall(r"^(\d\d) (\w+) ", out, re.MULTILINE)
    assert listed == [(f"{k:02d}", step.name) for k, step in enumerate(pipelines.ALL, start=1)]
    assert all(step.reason in out for step in pipelines.ALL)


def test_passes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["pass"] for row in rows] == [step.name for step in pipelines.ALL]
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["stage"] for row in rows] == [step.stage for step in pipelines.ALL]
    assert all(row["summary"] and row["reason"] and row["folder"] for row in rows)


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.__name__)
def test_help_describes_the_verb_and_shows_an_example(
    verb: object, capsys: pytest.CaptureFixture[str]
) -> None:
    name = verb.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert verb.__doc__.splitlines()[0] in out  # type: ignore[union-attr]
    assert f"example: fxquant {name}" in out


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.__name__)
def test_the_example_of_the_help_is_a_command_line(verb: object) -> None:
    arguments = verb.EXAMPLE.split()  # type: ignore[attr-defined]
    assert arguments[0] == "fxquant"
    assert cli.parser().parse_args(arguments[1:]).run is verb.run  # type: ignore[attr-defined]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert {"dump", "diff", "passes"} <= set(out.split())


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fxquant {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dumb", "digits"], ["dump"], ["diff", "digits"]])
def test_a_wrong_command_line_ends_with_2_and_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fxquant" in capsys.readouterr().err


def test_dump_of_a_saved_model(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", folder, "--after", "annotate"]) == 0
    out = capsys.readouterr().out
    number = 1 + [step.name for step in pipelines.ALL].index("annotate")
    assert out.splitlines()[0] == f"# {number:02d} annotate  +0 nodes"
    assert "%sample: f32[Bx3xhxw] = input" in out
    assert "mid_block.resnets.0.conv1.weight:i8/c0" in out
    assert folder not in out


def test_dump_shows_one_unit(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", folder, "--after", "strip_noops", "--unit", "mid_block.attentions"]) == 0
    headings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("#")][1:]
    assert headings
    assert all(x.startswith("# mid_block.attentions.0") for x in headings)


def test_dump_as_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["dump", folder, "--after", "capture", "--unit", "mid_block.resnets.0", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pass"], found["number"]) == ("capture", 0)
    assert {row["op"] for row in found["nodes"]} >= {"conv2d", "group_norm", "silu", "linear"}
    assert all(row["text"].startswith(f"%{row['name']}: ") for row in found["nodes"])


def test_dump_shows_the_lowered_graph_by_default(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dump", folder, "--recipe", "w4a8-fast"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# {len(pipelines.ALL)} {pipelines.ALL[-1].name}  +0 nodes\n")
    assert "fxquant.conv2d(" in out
    assert "weight_bits=4" in out
    assert "# unit mid_block.resnets.0  ResnetBlock2D" in out


def test_dump_finds_the_unet_of_a_pipeline(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unet").symlink_to(folder)
    assert main(["dump", str(tmp_path), "--after", "capture", "--unit", "conv_in"]) == 0
    assert "conv_in.weight" in capsys.readouterr().out


def test_diff_shows_what_a_pass_changed(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", folder, "--after", "annotate", "--unit", "mid_block.resnets.0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    names = [step.name for step in pipelines.ALL]
    before = names[names.index("annotate") - 1]
    assert lines[:2] == [f"--- {before}", "+++ annotate"]
    added = [x for x in lines[2:] if x.startswith("+")]
    assert added
    assert all(":i8/c0" in x for x in added)


def test_diff_of_a_pass_that_changed_nothing_is_empty(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", folder, "--after", "split_shortcut"]) == 0
    assert capsys.readouterr().out == ""


def test_diff_since_an_earlier_pass(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", folder, "--after", "annotate", "--since", "capture"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("--- capture\n+++ annotate\n")
    assert "dropout" in out


def test_nothing_comes_before_capture(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "diff", folder, "--after", "capture")
    assert "fxquant: PassError: nothing comes before capture; `fxquant dump --after" in err


def test_since_must_run_before_after(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "diff", folder, "--after", "strip_noops", "--since", "annotate")
    assert "'annotate' does not run before strip_noops" in err


@pytest.mark.parametrize("verb", ["dump", "diff"])
def test_an_unknown_pass_gets_a_near_name(
    verb: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, verb, folder, "--after", "anotate")
    assert "PassError: no pass is called 'anotate'. Did you mean 'annotate'? Known: " in err


def test_an_unknown_recipe_gets_a_near_name(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, "dump", folder, "--recipe", "w8a9-fast")
    assert "RecipeError: unknown bits 'w8a9'. Did you mean 'w8a8'?" in err


def test_an_unknown_model_gets_a_near_name(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "dump", "digit")
    assert "ModelError: 'digit' is no folder and no bundled model. Did you mean 'digits'?" in err


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, "dump", str(tmp_path))
    assert "holds no config.json; save a model there with save_pretrained" in err


@pytest.mark.parametrize(
    "config",
    ["not json", "[]", "{}", '{"_class_name": "NoSuchUNet"}', '{"_class_name": "UNet2DModel"}'],
    ids=["no JSON", "a list", "no class", "unknown class", "no weights"],
)
def test_a_damaged_folder_is_refused_by_name(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    err = refused(capsys, "dump", str(tmp_path))
    assert f"ModelError: {tmp_path} could not be loaded as a diffusers model" in err


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DDIMScheduler().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").rename(tmp_path / "config.json")
    assert "could not be loaded as a diffusers model" in refused(capsys, "dump", str(tmp_path))


def test_a_bundled_name_works_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["dump", "digits", "--after", "capture", "--unit", "conv_in"]) == 0
    assert "conv_in.weight" in capsys.readouterr().out
