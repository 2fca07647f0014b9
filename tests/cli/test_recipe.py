"""fxquant recipe list and show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxquant.cli import main
from fxquant.recipe import Override, Recipe, names


def test_list_shows_what_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("w8a8-fast", "w4a8-best", "q_diffusion:w4a8"))
    assert "pcr:w8a8" not in out
    assert "the 18 others are refused" in out


def test_list_as_json_gives_the_reason_for_every_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(names())
    for row in rows:
        if row["why_not"] is None:
            assert Recipe.parse(row["name"]).name == row["name"].removesuffix("-balanced")
        else:
            assert "is not available in this version" in row["why_not"]


def test_show_as_json_is_a_recipe_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "w4a8-fast", "--json"]) == 0
    path = tmp_path / "copy.json"
    path.write_text(capsys.readouterr().out)
    assert Recipe.load(path) == Recipe.parse("w4a8-fast")


def test_show_a_file_with_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    Recipe(overrides=(Override("mid_block.[ab]*", weight_bits=4, keep_float=False),)).save(path)
    assert main(["recipe", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "mid_block.[ab]*" in out
    assert "weight_bits=4, keep_float=False" in out
    assert "conv_in, conv_out" in out


def test_show_tells_how_units_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "w4a8"]) == 0
    out = capsys.readouterr().out
    assert "reconstruction of each unit" in out
    assert all(word in out for word in ("tdac", "fbr", "lr_weight", "iters"))


@pytest.mark.parametrize("name", ["w9a9", "pcr:w8a8-best", "none.json"])
def test_refusals_end_with_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", name]) == 2
    assert "fxquant: RecipeError: " in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "show"):
        with pytest.raises(SystemExit) as caught:
            main(["recipe", action, "--help"])
        assert caught.value.code == 0
        assert f"example: fxquant recipe {action}" in capsys.readouterr().out
