"""fxquant bisect: tables, JSON, plots, the exit status, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fxquant.cli import bisect, main
from fxquant.cli.bisect import all_records, worst_pass, worst_unit
from fxquant.evaluate.bisect import AfterPass, UnitError
from fxquant.passes import pipelines

NAMES = ["capture", *(step.name for step in pipelines.ALL)]
QUICK = ("--calls", "2", "--batch", "1")


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline is compiled for the first test and remembered for the others."""
    monkeypatch.setattr(bisect, "all_records", remembered)


MADE: list[Any] = []


def remembered(*arguments: Any) -> Any:
    if not MADE:
        MADE.append(all_records(*arguments))
    return MADE[0]


@pytest.mark.usefixtures("once")
def test_passes_and_units_as_json_with_plots(pipeline, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = [
        "bisect",
        pipeline,
        *QUICK,
        "--recipe",
        "w4a4-fast",
        "--plots",
        str(tmp_path / "p"),
    ]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in report["passes"]] == NAMES
    assert report["worst_pass"] == "observers_to_fake_quant"
    errors = {u["path"]: u for u in report["units"]}
    assert errors["conv_in"]["isolated"] == 0
    assert report["worst_unit"] == max(errors.values(), key=lambda u: u["isolated"])["path"]
    last = report["passes"][-1]["error"]
    assert errors["conv_out"]["cumulative"] == pytest.approx(last, rel=0.3)
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["errors.png", "ranges.png"]


@pytest.mark.usefixtures("once")
def test_tables_up_to_a_pass_and_a_bar_for_the_error(pipeline, capsys):
    arguments = ["bisect", pipeline, *QUICK, "--until", "observers_to_fake_quant"]
    assert main([*arguments, "--max-error", "1e-9"]) == 1
    out = capsys.readouterr().out
    assert "biggest jump: observers_to_fake_quant" in out
    assert "worst by itself: " in out
    assert "group_units" not in out
    assert "mid_block.resnets.0  ResnetBlock2D" in out


def test_an_unknown_pass_is_refused_before_any_work(refused, monkeypatch):
    monkeypatch.setattr(bisect, "load_model", None)
    message = refused("bisect", "digits", "--until", "fuse_epilogs")
    assert "PassError: no pass is called 'fuse_epilogs'. Did you mean 'fuse_epilogues'?" in message


def test_an_artefact_has_no_passes_to_look_between(artefact, refused):
    assert "compiled artefact; this command starts from the float model" in refused(
        "bisect", artefact
    )


def test_the_worst():
    passes = [AfterPass("a", 0.1, 0.1), AfterPass("b", 0.4, 0.3), AfterPass("c", 0.2, -0.2)]
    assert worst_pass(passes) is passes[1]
    assert worst_pass([AfterPass("a", 0.0, 0.0)]) is None
    units = [UnitError("u", "K", 0.9, 0.1), UnitError("v", "K", 0.1, 0.2)]
    assert worst_unit(units) is units[1]
    assert worst_unit([UnitError("u", "K", 0.5, 0.0)]) is None
