"""fxquant eval: figures by model, the exit status, and every refusal."""

from __future__ import annotations

import json

import pytest

from fxquant import cli
from fxquant.cli import eval as verb
from fxquant.cli import main
from fxquant.cli.pair import Pair
from fxquant.recipe import Recipe
from tests.cli.conftest import QUICK


def test_an_artefact_is_compared_call_by_call(artefact, pipeline, capsys):
    assert main(["eval", artefact, "--against", pipeline, *QUICK]) == 0
    out = capsys.readouterr().out
    assert "w8a8-fast against float on equal inputs, N = 2 calls" in out
    assert "relative L2" in out


def test_as_json_and_the_bar_for_psnr(artefact, pipeline, capsys):
    arguments = ["eval", artefact, "--against", pipeline, *QUICK, "--json"]
    assert main([*arguments, "--min-psnr", "10"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n"] == len(report["calls"]) == 2
    assert all(0 < c["relative_l2"] < 0.2 and c["psnr"] > 20 for c in report["calls"])
    assert report["psnr"] == pytest.approx(sum(c["psnr"] for c in report["calls"]) / 2)
    assert main([*arguments, "--min-psnr", str(report["psnr"] + 0.01)]) == 1


def test_an_artefact_alone_has_nothing_to_compare_with(artefact, refused):
    message = refused("eval", artefact)
    assert "ModelError" in message
    assert "holds no float model to compare with" in message
    assert "--against MODEL" in message


def test_image_figures_need_labels(pipeline, refused, monkeypatch):
    monkeypatch.setattr(verb, "compiled_of", None)  # refused before any work
    message = refused("eval", pipeline, "--images", "10")
    assert "EvaluationError: figures over images need class labels" in message
    assert "Leave the number of images out" in message


def test_digits_are_sampled(monkeypatch, capsys):
    def itself(_options, reference):
        reference.recipe = Recipe()
        return Pair(reference, reference, "digits")  # type: ignore[arg-type]

    monkeypatch.setattr(verb, "compiled_of", itself)
    arguments = ["eval", "digits", "--images", "10", "--steps", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "DDIM 1 steps, N = 10 images in each of three sets, 1,797 real digits" in out
    assert "FD, KID, precision, recall: penultimate layer of the bundled digits classifier" in out
    assert "spatial FD: last convolution of the bundled digits classifier" in out
    assert "KID is too low by O(1 / N), as labels are balanced" in out
    assert "classifier score, recognised: classes read by the bundled digits classifier" in out
    assert "1.000 (1.000-1.000)" in out
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["steps"], report["seeds"]) == (10, 1, [0, 1, 2])
    assert report["real_images"] == 1797
    for name in ("recognition", "kid", "spatial_fd", "precision", "recall", "classifier_score"):
        assert report[name] == report[f"{name}_float"], name
    assert report["ssim"] == pytest.approx(1.0)
    assert "64 numbers" in report["feature"]


@pytest.mark.slow
def test_digits_for_real(capsys):
    arguments = ["--images", "50", "--steps", "5", "--calls", "5"]
    assert main(["eval", "digits", *arguments, "--json", "--min-psnr", "30"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"] == "w8a8-fast"
    assert report["fd_ratio"] < 1.5
    assert report["recognition"] > 0.9


def test_the_verb_is_listed():
    assert verb in cli.VERBS
