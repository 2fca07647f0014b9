"""fxquant bench: what is measured and how it is told. No test looks at a time."""

from __future__ import annotations

import json

import fxquant
from fxquant.cli import main
from fxquant.evaluate.accounting import PARTS

QUICK = ("--rounds", "1", "--batch", "1")


def test_a_float_model_is_compiled_and_compared(artefact, pipeline, monkeypatch, capsys):
    given, compiled = {}, fxquant.load(artefact)

    def compile_(_model, calls, recipe, **_options: object):
        given.update(recipe=recipe.name, shapes=[tuple(c["sample"].shape) for c in calls])
        return compiled

    monkeypatch.setattr(fxquant, "compile", compile_)
    assert main(["bench", pipeline, *QUICK, "--profile"]) == 0
    out = capsys.readouterr().out
    for text in ("one step, sample [1, 3, 8, 8]", "float32", "bfloat16", "w8a8-fast", *PARTS):
        assert text in out
    assert "time by kind of operator" in out
    assert "fxquant.conv2d" in out
    assert given == {"recipe": "w8a8-fast", "shapes": [(1, 3, 8, 8)]}


def test_an_artefact_against_its_model_as_json(artefact, pipeline, capsys):
    arguments = ["bench", artefact, "--against", pipeline, *QUICK, "--size", "16"]
    assert main([*arguments, "--profile", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sample"] == [1, 3, 16, 16]
    assert [s["name"] for s in report["systems"]] == ["float32", "bfloat16", "w8a8-fast"]
    weights = [s["weights"] for s in report["systems"]]
    assert weights[0] == 2 * weights[1] > 3 * weights[2]
    assert list(report["size"]) == list(PARTS)
    assert 0.06 < report["bit_operations"] / report["float_bit_operations"] < 0.3
    assert {p["kind"].split(".")[0] for p in report["profile"]} >= {"fxquant", "aten"}


def test_an_artefact_alone(artefact, capsys):
    assert main(["bench", artefact, *QUICK, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in report["systems"]] == ["w8a8-fast"]
    assert "profile" not in report
