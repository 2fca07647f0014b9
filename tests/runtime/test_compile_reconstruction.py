"""compile() with recipes that reconstruct: what it learns, resumes, refuses and saves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant import QuantizedModel
from fxquant.calibration import record_selected
from fxquant.errors import CheckpointError, RecipeError
from fxquant.reconstruction.reconstruct import default_budget
from tests.runtime import compiled as c
from tests.toy import relative_error

TRAIN: dict[str, Any] = {"iters": 60}


def calls(batch: int = 16) -> list[c.Call]:
    return c.mite_calls(n=4, batch=batch)


def trained(recipe: Any = "w4a8", **options: Any) -> QuantizedModel:
    return c.compiled(c.mite(), calls(), recipe, **{**TRAIN, **options})


def error(model: QuantizedModel) -> float:
    other = c.mite_calls(n=4, batch=8, seed=5)  # new images of the same timesteps
    exact, quantised = (torch.cat([c.result(m, call) for call in other]) for m in (c.mite(), model))
    return relative_error(quantised, exact)


@pytest.mark.parametrize("recipe", ["w4a8", "w4a4", "q_diffusion:w4a8", "ptq4dm:w4a8"])
def test_reconstruction_brings_the_model_nearer_to_float(recipe: str) -> None:
    kept = ("conv_in", "conv_out", "time")  # the time layer's 32 weights have nothing to choose
    plain = c.float32(f"{recipe.rpartition(':')[2]}-fast", keep_float=kept)
    learned = trained(c.float32(recipe, keep_float=kept), iters=200)
    assert error(learned) < 0.8 * error(c.compiled(c.mite(), calls(), plain))


def test_it_says_what_became_of_every_unit() -> None:
    summary = trained().summary
    assert [unit.path for unit in summary.units] == ["time", "conv"]
    assert "2 units reconstructed, 120 iterations: loss 0." in str(summary)
    assert summary.to_json()["units"][0]["iters"] == 60
    assert not c.compile_mite().summary.units


def test_equal_seeds_are_equal_bit_for_bit_and_others_are_not() -> None:
    (first, second), other = (trained().state_dict() for _ in range(2)), trained(seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[n], v) for n, v in other.state_dict().items())


def test_a_saved_model_computes_what_was_learned(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    call = calls()[1]
    assert torch.equal(c.result(loaded, call), c.result(model, call))
    assert loaded.recipe == model.recipe
    assert loaded.recipe.reconstruction is not None
    assert loaded.recipe.reconstruction.iters == 60


def test_resume_takes_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trained(resume=tmp_path).state_dict()
    assert (tmp_path / "unit_0000.safetensors").exists()
    second = trained(resume=tmp_path).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_takes_what_is_there_in_another_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default memory budget follows the container's limit, and is no part of the run."""
    first = trained(resume=tmp_path).state_dict()
    monkeypatch.setattr(
        "fxquant.reconstruction.reconstruct.default_budget", lambda: 2 * default_budget()
    )
    second = trained(resume=tmp_path).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"seed": 1}, "samples, seed differ"),
        ({"iters": 7}, "recipe differ"),
        ({"memory_budget": 1 << 20}, "memory_budget differ"),
        ({"time_budget": 100.0}, "time_budget differ"),
    ],
)
def test_resume_refuses_another_run(tmp_path: Path, options: dict[str, Any], differs: str) -> None:
    trained(resume=tmp_path)
    with pytest.raises(CheckpointError, match=differs):
        trained(resume=tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [{"iters": 5}, {"time_budget": 1.0}, {"memory_budget": 10**9}, {"resume": "somewhere"}],
)
def test_a_recipe_that_does_not_reconstruct_refuses_such_options(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(RecipeError, match=f"'w8a8-fast' does not reconstruct .* {name}; effort"):
        c.compile_mite(**options)


@pytest.mark.parametrize("name", ["time_budget", "memory_budget"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_budget_is_positive(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"{name}=.*; it is positive, or None"):
        trained(**{name: value})


def test_tdac_without_a_middle_block_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fxquant"):
        trained()
    assert "uniform" in caplog.text


def test_samples_that_were_selected_before_all_train() -> None:
    model = c.mite()

    def run() -> None:
        for call in reversed(calls()):
            model(**call)

    chosen = record_selected(model, [run, run], count=24, sampler="uniform")
    result = c.compiled(model, chosen, "w4a8", iters=20)
    assert result.summary.units[0].iters == 20
    assert error(result) < 0.5


def test_timestep_groups_learn_a_step_each() -> None:
    plain = c.compiled(c.mite(), calls(), c.float32("w4a8-fast", timestep_groups=2))
    model = trained(c.float32("w4a8", timestep_groups=2))
    changed = model.table.values[..., 0] != plain.table.values[..., 0]
    assert bool(changed.all(0).any()), "some quantiser has a new step in both rows"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_where_compile_is_called(mode: Any) -> None:
    model, given = c.mite(), calls()
    with mode():
        result = c.compiled(model, given, "w4a8", **TRAIN)
    assert result.summary.units[1].loss_after < result.summary.units[1].loss_before


def test_a_model_made_in_inference_mode_can_be_reconstructed() -> None:
    with torch.inference_mode():
        result = trained()
    assert result.summary.units[1].loss_after < result.summary.units[1].loss_before


def test_the_models_parameters_get_no_gradients() -> None:
    model = c.mite()
    c.compiled(model, calls(), "w4a8", **TRAIN)
    assert all(p.grad is None for p in model.parameters())


def test_a_channels_last_model_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, torch.Tensor]:
        model = c.mite().to(memory_format=torch.channels_last)
        return c.compiled(model, calls(), "w4a8", iters=20, **options).state_dict()

    whole = run(resume=tmp_path)
    (tmp_path / "unit_0001.safetensors").unlink()
    resumed = run(resume=tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_can_be_reconstructed(dtype: torch.dtype) -> None:
    half = [{k: v.to(dtype) if k == "sample" else v for k, v in call.items()} for call in calls()]
    result = c.compiled(c.mite().to(dtype), half, "w4a8", iters=100)
    conv = result.summary.units[1]
    assert conv.loss_after < conv.loss_before
