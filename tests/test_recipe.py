"""Recipe names, fields and refusals."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from fxquant.errors import RecipeError
from fxquant.presets import EFFORTS, METHODS, TASKS
from fxquant.quant.observers import OBSERVERS
from fxquant.recipe import BITS, KEEP_FLOAT, Recipe
from fxquant.reconstruction.settings import Reconstruction


@pytest.mark.parametrize(
    ("name", "bits", "observer"),
    [
        ("w8a8-fast", (8, 8), "absmax"),
        ("w4a8-fast", (4, 8), "pnorm"),
        ("w4a4-fast", (4, 4), "pnorm"),
        ("eda_dm:w4a8-fast", (4, 8), "pnorm"),
    ],
)
def test_a_name_sets_bits_and_the_weight_search(
    name: str, bits: tuple[int, int], observer: str
) -> None:
    recipe = Recipe.parse(name)
    assert (recipe.weight_bits, recipe.activation_bits) == bits
    assert (recipe.method, recipe.effort, recipe.weight_observer) == ("eda_dm", "fast", observer)


@pytest.mark.parametrize("name", ["w8a8-fast", "w4a8-fast", "w4a4-fast"])
def test_a_recipe_knows_its_name(name: str) -> None:
    assert Recipe.parse(name).name == name
    assert Recipe.parse(Recipe.parse(name).name) == Recipe.parse(name)


def test_the_default_recipe_is_w8a8_fast() -> None:
    assert Recipe() == Recipe.parse("w8a8-fast")


def test_a_recipe_is_returned_as_it_is() -> None:
    recipe = Recipe(timestep_groups=3)
    assert Recipe.parse(recipe) is recipe


def test_first_last_and_embedding_layers_stay_float_by_default() -> None:
    assert Recipe().keep_float == KEEP_FLOAT
    assert {"conv_in", "conv_out", "time_embedding.*"} <= set(KEEP_FLOAT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a9-fast", "unknown bits 'w8a9'. Did you mean 'w8a8'? Known: w4a4, w4a8, w8a8."),
        ("W8A8-fast", "unknown bits 'W8A8'. Did you mean 'w8a8'?"),
        ("fast", "unknown bits 'fast'"),
        ("w8a8-fasst", "unknown effort 'fasst'. Did you mean 'fast'? Known: balanced, best, fast."),
        ("eda:w8a8-fast", "unknown method 'eda'. Did you mean 'eda_dm'? Known: adp_dm, eda_dm"),
        ("w8a8 fast", "'w8a8 fast' is no recipe name; the form is [method:]bits[-effort]"),
        ("w8a8-fast-best", "'w8a8-fast-best' is no recipe name"),
        ("", "'' is no recipe name; the form is [method:]bits[-effort], e.g. w8a8-fast"),
    ],
)
def test_a_wrong_name_is_refused_with_what_was_meant(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("wrong", [8, None, ["w8a8"]])
def test_what_is_neither_a_name_nor_a_recipe_is_refused(wrong: Any) -> None:
    with pytest.raises(RecipeError, match=f"or a Recipe, not a {type(wrong).__name__}"):
        Recipe.parse(wrong)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_every_name_of_the_grammar_works_or_says_what_does(
    method: str, bits: str, effort: str
) -> None:
    name = f"{method}:{bits}-{effort}"
    try:
        recipe = Recipe.parse(name)
    except RecipeError as error:
        assert f"method '{method}' is not available in this version" in str(error)  # noqa: PT017
        assert method in ("adp_dm", "pcr")
    else:
        assert Recipe.parse(recipe.name) == recipe


def test_a_name_without_effort_means_balanced() -> None:
    assert Recipe.parse("w4a8") == Recipe.parse("w4a8-balanced")
    assert Recipe.parse("w4a8").name == "w4a8"


@pytest.mark.parametrize("method", ["eda_dm", "q_diffusion", "ptq4dm"])
def test_efforts_reconstruct_more_and_more(method: str) -> None:
    fast, balanced, best = (Recipe.parse(f"{method}:w4a8-{e}") for e in EFFORTS)
    assert fast.reconstruction is None
    assert balanced.reconstruction is not None
    assert best.reconstruction is not None
    assert best.reconstruction.iters > balanced.reconstruction.iters
    assert best.reconstruction.samples > balanced.reconstruction.samples


def test_baselines_are_their_published_combinations() -> None:
    q_diffusion = Recipe.parse("q_diffusion:w4a8")
    assert q_diffusion.split_shortcut
    assert q_diffusion.reconstruction is not None
    assert q_diffusion.reconstruction.sampler == "uniform"
    assert (q_diffusion.reconstruction.loss, q_diffusion.reconstruction.order) == (
        "block",
        "sequential",
    )
    ptq4dm = Recipe.parse("ptq4dm:w8a8").reconstruction
    assert ptq4dm is not None
    assert (ptq4dm.sampler, ptq4dm.loss) == ("normal", "block")
    eda_dm = Recipe.parse("w8a8").reconstruction
    assert eda_dm is not None
    assert (eda_dm.sampler, eda_dm.loss) == ("tdac", "fbr")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4"])
def test_a_task_brings_the_published_settings(task: str, bits: str) -> None:
    published = TASKS[task]
    best = Recipe.parse(f"{bits}-best", task=task).reconstruction
    assert best is not None
    assert (best.iters, best.batch, best.samples) == (
        published.iters,
        published.batch,
        published.samples,
    )
    assert (best.variety_weight, best.gamma) == (published.variety_weight, published.gamma)
    assert best.lr_weight == published.lr_weight[bits != "w8a8"]
    balanced = Recipe.parse(bits, task=task).reconstruction
    assert balanced is not None
    assert balanced.iters == published.iters // 5


@pytest.mark.parametrize(
    ("recipe", "task", "message"),
    [
        ("w4a8", "bedrom", "unknown task 'bedrom'. Did you mean 'bedroom'?"),
        ("q_diffusion:w4a8", "sd", "tasks are EDA-DM's; 'q_diffusion' has none"),
        ("w4a8-fast", "sd", "effort 'fast' does not reconstruct, so task='sd' means nothing"),
        (Recipe(), "sd", "goes with a recipe's name"),
        ("mine.json", "sd", "goes with a recipe's name"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(recipe: Any, task: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(recipe, task=task)
    assert message in str(caught.value)


def test_with_changes_single_settings_of_the_reconstruction() -> None:
    recipe = Recipe.parse("w4a8")
    assert recipe.reconstruction is not None
    other = recipe.with_(reconstruction={"iters": 7, "loss": "block"})
    assert other.reconstruction == replace(recipe.reconstruction, iters=7, loss="block")
    assert other.with_(effort="best") == Recipe.parse("w4a8-best")
    assert other.with_(effort="fast") == Recipe.parse("w4a8-fast")
    slower = Recipe.parse("w4a8-fast").with_(effort="best", reconstruction={"iters": 7})
    assert slower == Recipe.parse("w4a8-best").with_(reconstruction={"iters": 7})
    q_diffusion = recipe.with_(method="q_diffusion", reconstruction={"iters": 7})
    assert q_diffusion.reconstruction is not None
    assert (q_diffusion.reconstruction.order, q_diffusion.reconstruction.iters) == ("sequential", 7)
    with pytest.raises(RecipeError, match="a reconstruction has no field 'iter'"):
        recipe.with_(reconstruction={"iter": 7})
    with pytest.raises(RecipeError, match="'w8a8-fast' does not reconstruct"):
        Recipe().with_(reconstruction={"iters": 7})
    with pytest.raises(RecipeError, match="effort 'fast' calibrates ranges only"):
        Recipe(reconstruction=Reconstruction())
    with pytest.raises(RecipeError, match="give a Reconstruction"):
        Recipe(effort="best", reconstruction="fbr")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sampler", "tdca", "unknown sampler 'tdca'. Did you mean 'tdac'?"),
        ("loss", "fbrr", "unknown loss 'fbrr'. Did you mean 'fbr'?"),
        ("order", "both", "unknown order 'both'. Known: joint, sequential."),
        ("iters", 0, "reconstruction iters=0; it is a number of 1 or more"),
        ("samples", 2.5, "reconstruction samples=2.5; it is a number of 1 or more"),
        ("batch", True, "reconstruction batch=True; it is a number of 1 or more"),
        ("lr_weight", 0, "reconstruction lr_weight=0; it is positive"),
        ("lr_scale", -1e-3, "reconstruction lr_scale=-0.001; it is 0 or more"),
        ("gamma", "1", "reconstruction gamma='1'; it is 0 or more"),
        ("drop", 1.5, "reconstruction drop=1.5; it is between 0 and 1"),
        ("threshold", -1.0, "reconstruction threshold=-1.0; it is 0 or more, or None"),
        ("rounding_weight", float("nan"), "reconstruction rounding_weight=nan; it is 0 or more"),
    ],
)
def test_a_wrong_setting_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("w4a8").with_(reconstruction={field: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "eda-dm", "unknown method 'eda-dm'. Did you mean 'eda_dm'?"),
        ("effort", "quick", "unknown effort 'quick'. Known: balanced, best, fast."),
        ("weight_observer", "abs_max", "unknown weight_observer 'abs_max'. Did you mean 'absmax'?"),
        ("activation_observer", "pnrm", "unknown observer 'pnrm'. Did you mean 'pnorm'?"),
        ("compute_dtype", "bf16", "unknown compute_dtype 'bf16'. Did you mean 'bfloat16'?"),
        ("weight_bits", 1, "weight_bits=1; quantisers have 2 to 16 bits"),
        ("weight_bits", 17, "weight_bits=17; quantisers have 2 to 16 bits"),
        ("weight_bits", "8", "weight_bits='8'; quantisers have 2 to 16 bits"),
        ("activation_bits", 7.5, "activation_bits=7.5; quantisers have 2 to 16 bits"),
        ("timestep_groups", 0, "timestep_groups=0; at least 1 is needed"),
        ("timestep_groups", "2", "timestep_groups='2'; at least 1 is needed"),
        ("keep_float", "conv_in", "keep_float='conv_in'; give a tuple of patterns"),
    ],
)
@pytest.mark.parametrize("construct", [Recipe, Recipe().with_], ids=["Recipe", "with_"])
def test_a_wrong_value_is_refused(construct: Any, field: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        construct(**{field: value})
    assert message in str(caught.value)


@pytest.mark.parametrize("bits", [2, 16])
def test_the_ends_of_the_bit_range_are_allowed(bits: int) -> None:
    assert Recipe(weight_bits=bits, activation_bits=bits).bits_name == f"w{bits}a{bits}"


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_can_be_chosen(name: str) -> None:
    assert Recipe(activation_observer=name).activation_observer == name


def test_with_changes_a_copy() -> None:
    recipe = Recipe()
    other = recipe.with_(timestep_groups=4, activation_symmetric=True)
    assert (other.timestep_groups, other.activation_symmetric) == (4, True)
    assert recipe == Recipe()
    assert other.with_(timestep_groups=1, activation_symmetric=False) == recipe


def test_with_an_unknown_field_suggests_a_near_one() -> None:
    with pytest.raises(RecipeError, match=r"no field 'weight_bit'\. Did you mean 'weight_bits'\?"):
        Recipe().with_(weight_bit=4)


def test_a_recipe_is_frozen_and_can_be_a_key() -> None:
    recipe = Recipe(keep_float=["conv_in", "mid_block.*"])  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        recipe.weight_bits = 4  # type: ignore[misc]
    assert {recipe: 1}[Recipe(keep_float=("conv_in", "mid_block.*"))] == 1


@pytest.mark.parametrize("name", ["w4a8-fast", "w4a8", "q_diffusion:w8a8-best"])
def test_json_holds_every_field_and_gives_the_recipe_back(name: str) -> None:
    recipe = Recipe.parse(name).with_(timestep_groups=8, keep_float=("conv_in",))
    text = json.dumps(recipe.to_json())
    assert set(json.loads(text)) == {f.name for f in fields(Recipe)}
    assert Recipe.from_json(json.loads(text)) == recipe
