"""fxquant quantize: an artefact that loads and computes, and every refusal before the work."""

from __future__ import annotations

import json

import pytest
import torch

import fxquant
from fxquant.cli import main, quantize
from fxquant.evaluate.figures import output
from fxquant.passes import pipelines
from tests import models
from tests.cli.conftest import QUICK, small_unet
from tests.toy import relative_error


def test_the_artefact_computes_what_the_model_does(artefact):
    model = small_unet()
    call = models.calls(model, 2)[1]
    error = relative_error(output(fxquant.load(artefact), call), output(model, call))
    assert 0 < error < 0.2


def test_a_recipe_that_reconstructs_resumes(pipeline, tmp_path, capsys):
    kept = tmp_path / "kept"
    arguments = ["--recipe", "w4a8", "--iters", "3", "--resume", str(kept), *QUICK]
    for name in ("first", "second"):
        assert main(["quantize", pipeline, "--out", str(tmp_path / name), *arguments]) == 0
        assert "units reconstructed" in capsys.readouterr().out
    assert len(list(kept.glob("unit_*.safetensors"))) > 2
    first, second = (fxquant.load(tmp_path / n).state_dict() for n in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_equal_seeds_make_equal_artefacts(artefact, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FXQUANT_DUMP", str(tmp_path / "dumps"))
    out = tmp_path / "new" / "again"
    assert main(["quantize", pipeline, "--out", str(out), *QUICK, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == str(out)
    assert report["summary"]["recipe"] == "w8a8-fast"
    assert len(list((tmp_path / "dumps").iterdir())) == 1 + len(pipelines.ALL)
    monkeypatch.delenv("FXQUANT_DUMP")  # load dumps its passes, too
    first, second = (fxquant.load(path).table.values for path in (artefact, str(out)))
    assert torch.equal(first, second)


def test_arguments_reach_compile(artefact, pipeline, tmp_path, monkeypatch, capsys):
    given, compiled = {}, fxquant.load(artefact)

    def compile_(model, calls, recipe, **options: object):
        given.update(options, recipe=recipe.name, calls=len(calls))
        return compiled

    monkeypatch.setattr(fxquant, "compile", compile_)
    arguments = ["--recipe", "w4a8", "--seed", "3", "--strict", "--backend", "reference"]
    arguments += ["--iters", "7", "--time-budget", "9", "--memory-budget", "2.5"]
    arguments += ["--resume", str(tmp_path / "kept")]
    assert main(["quantize", pipeline, "--out", str(tmp_path / "out"), *QUICK, *arguments]) == 0
    assert given == {
        "recipe": "w4a8", "calls": 2, "seed": 3, "strict": True, "backend": "reference",
        "iters": 7, "time_budget": 9.0, "memory_budget": 2_500_000_000, "resume": tmp_path / "kept",
    }  # fmt: skip
    out = capsys.readouterr().out
    assert str(compiled.summary) in out
    assert f"{tmp_path / 'out'}: saved; fxquant.load(" in out


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if calls are made: a refusal must come before."""

    def fail(*_args: object) -> None:
        raise AssertionError("calls were recorded before the refusal")

    monkeypatch.setattr(quantize, "calls_for", fail)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "ModelError: 'digit' is no folder and no bundled model. Did you mean 'digits'"),
        (["digits", "--recipe", "w8a9"], "RecipeError"),
        (["digits", "--iters", "5"], "RecipeError: recipe 'w8a8-fast' does not reconstruct"),
        (["digits", "--recipe", "w4a8", "--time-budget", "0"], "time_budget=0.0; it is positive"),
        (["digits", "--recipe", "q_diffusion:w4a8", "--task", "sd"], "tasks are EDA-DM's"),
        (["digits", "--backend", "x68"], "BackendError: unknown backend 'x68'. Did you mean 'x86'"),
    ],
)
def test_refusals(arguments, message, tmp_path, refused):
    assert message in refused("quantize", *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_work")
def test_an_output_that_cannot_be_written_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("")
    message = refused("quantize", "digits", "--out", str(tmp_path / "file"))
    assert "SettingError" in message
    assert "is a file; name another folder" in message


@pytest.mark.parametrize("name", ["", " "])
@pytest.mark.parametrize("option", ["--out", "--resume", "--calib"])
def test_an_empty_name_is_not_the_working_folder(option, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    others = [] if option == "--out" else ["--out", "out"]
    with pytest.raises(SystemExit):
        main(["quantize", "digits", *others, option, name])
    assert f"argument {option}: it is empty: name a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_work")
def test_an_artefact_is_not_quantised_again(artefact, tmp_path, refused):
    message = refused("quantize", artefact, "--out", str(tmp_path / "out"))
    assert "is a compiled artefact; this command starts from the float model" in message


def test_a_wrong_setting_of_the_log_is_refused(monkeypatch, refused):
    monkeypatch.setenv("FXQUANT_LOG", "loud")
    assert "SettingError: FXQUANT_LOG: unknown level 'loud'" in refused("passes")
