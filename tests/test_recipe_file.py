"""Overrides and recipe files: what they hold, and every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import RecipeError
from fxquant.recipe import Override, Recipe, names

README = Path(__file__).parents[1] / "README.md"
MIXED = Recipe.parse("w4a8-fast").with_(
    timestep_groups=4,
    keep_float=("conv_in", "mid_block.*"),
    overrides=(
        Override("*.attn2.*", weight_bits=8, activation_symmetric=True),
        Override("conv_out", keep_float=False, weight_granularity="tensor"),
    ),
)


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    MIXED.save(path)
    assert Recipe.load(path) == MIXED
    assert Recipe.parse(str(path)) == MIXED
    assert Recipe.parse(path) == MIXED
    assert {MIXED: 1}[Recipe.load(path)] == 1


def test_an_override_in_json_holds_only_what_it_changes() -> None:
    assert MIXED.to_json()["overrides"][0] == {
        "pattern": "*.attn2.*",
        "weight_bits": 8,
        "activation_symmetric": True,
    }


def test_fields_that_a_file_lacks_have_their_default() -> None:
    assert Recipe.from_json({}) == Recipe()
    assert Recipe.from_json({"weight_bits": 4}) == Recipe(weight_bits=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a recipe is a JSON object, not []"),
        ({"weight_bit": 4}, "a recipe has no field 'weight_bit'. Did you mean 'weight_bits'?"),
        ({"weight_bits": "4"}, "weight_bits='4'; quantisers have 2 to 16 bits"),
        ({"weight_bits": True}, "weight_bits=True; quantisers have 2 to 16 bits"),
        ({"method": 8}, "unknown method 8. Known: adp_dm"),
        ({"activation_observer": ["minmax"]}, "unknown observer \"['minmax']\""),
        ({"split_shortcut": 1}, "split_shortcut=1; it is true or false"),
        ({"activation_symmetric": "no"}, "activation_symmetric='no'; it is true or false"),
        ({"timestep_groups": True}, "timestep_groups=True; at least 1 is needed"),
        ({"keep_float": "conv_in"}, "keep_float='conv_in'; give a tuple of patterns"),
        ({"keep_float": [1]}, "keep_float=[1]; give a tuple of patterns"),
        ({"overrides": {}}, "overrides={}; give a tuple of Overrides"),
        ({"overrides": ["conv_in"]}, "an override is a JSON object, not 'conv_in'"),
        ({"overrides": [{"weight_bits": 4}]}, "an override needs a pattern: {'weight_bits': 4}"),
        ({"overrides": [{"pattern": "a", "bits": 4}]}, "an override has no field 'bits'"),
        ({"overrides": [{"pattern": 3, "weight_bits": 4}]}, "override pattern=3; give a path"),
    ],
)
def test_what_is_no_recipe_is_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_json(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the override of 'a.*' changes nothing; set one of weight_bits, activation_bits"),
        ({"weight_bits": 1}, "weight_bits=1; quantisers have 2 to 16 bits"),
        ({"weight_bits": 17}, "weight_bits=17; quantisers have 2 to 16 bits"),
        ({"activation_bits": 4.0}, "activation_bits=4.0; quantisers have 2 to 16 bits"),
        ({"keep_float": 1}, "keep_float=1; it is true or false"),
        ({"activation_symmetric": "yes"}, "activation_symmetric='yes'; it is true or false"),
        ({"weight_granularity": "row"}, "unknown weight_granularity 'row'. Known: channel, tensor"),
    ],
)
def test_a_wrong_override_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Override("a.*", **changes)
    assert message in str(caught.value)


def test_overrides_are_overrides() -> None:
    with pytest.raises(RecipeError, match="give a tuple of Overrides"):
        Recipe(overrides=({"pattern": "a", "weight_bits": 4},))  # type: ignore[arg-type]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe could be read from .*none\.json: No such"):
        Recipe.parse(str(tmp_path / "none.json"))
    with pytest.raises(RecipeError, match=r"no recipe could be read from .*: Is a directory"):
        Recipe.parse(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"recipe file .*r\.json is not JSON: .*line 1 column 2"),
        (b"\xff\xfe", r"recipe file .*r\.json is not JSON"),
        (b'{"weight_bits": 40}', r"recipe file .*r\.json: weight_bits=40; quantisers have 2 to 16"),
        (b'{"method": "pcr"}', r"recipe file .*r\.json: method 'pcr' is not available"),
        (b'{"reconstruction": {"its": 1}}', r"r\.json: a reconstruction has no field 'its'"),
        (b'{"reconstruction": 3}', r"r\.json: a reconstruction is a JSON object, not 3"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)


def test_names_are_the_whole_grammar() -> None:
    assert len(set(names())) == len(names()) == 45
    assert {"w8a8-fast", "w4a4-balanced", "pcr:w4a8-best"} <= set(names())


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(from fxquant.recipe .*?)```", README.read_text(), re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    exec("import fxquant\n" + code.group(1), {})
    assert json.loads((tmp_path / "mine.json").read_text())["overrides"][0]["weight_bits"] == 4
