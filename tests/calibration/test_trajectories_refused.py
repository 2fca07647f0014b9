"""Runs that cannot be followed, and options that make no sense, each with its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.calibration import record_selected
from fxquant.errors import CallError, LoaderError, RecipeError, SettingError


class Echo(nn.Module):
    """Has no middle block, and gives back what it gets."""

    def forward(self, sample: Tensor, timestep: Any = None, extra: Any = None) -> Tensor:
        return sample


def test_without_a_middle_block_samples_are_taken_uniformly():
    echo, x = Echo(), torch.randn(8, 2)
    selection = record_selected(echo, [lambda: [echo(x, t) for t in (3, 2)]], count=4).selection
    assert selection.sampler == "uniform"
    assert "the model has neither" in str(selection.reason)


def loop(*calls: tuple[Any, ...]) -> Callable[[Echo], Callable[[], object]]:
    return lambda echo: lambda: [echo(*call) for call in calls]


X = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("runs", "guided", "message"),
    [
        ([], False, "there are no runs"),
        ([loop()], False, "run 0: nothing was recorded: run never called this Echo"),
        ([loop((X, 5), (X, 1), (X, 5))], False, "run 0: the timestep rose from 1 to 5"),
        ([loop((X, 5), (X[:2], 1))], False, "run 0: the shapes changed at timestep 1"),
        ([loop((X, torch.arange(4)))], False, "run 0: the rows of a call have different"),
        ([loop((X,))], False, "run 0: a call has no timestep"),
        ([loop((X, 5, torch.ones(8)))], False, r"extra has shape \[8\], the sample has 4 rows"),
        ([loop((X[:3], 5))], True, r"guided=True .*these 3 are not\. Leave guided out"),
        ([loop((torch.arange(8.0).view(4, 2), 5))], True, "two equal halves"),
        ([loop((X, 5)), loop((X, 4))], False, "run 1 never called the model at timestep 5"),
    ],
    ids=[
        "none",
        "no calls",
        "second batch",
        "rows",
        "timesteps",
        "no timestep",
        "batch",
        "odd",
        "unequal halves",
        "other steps",
    ],
)
def test_runs_that_cannot_be_followed_are_refused(runs, guided, message):
    echo = Echo()
    made = [run(echo) for run in runs]
    with pytest.raises(LoaderError, match=message):
        record_selected(echo, made, count=8, sampler="uniform", guided=guided)
    assert not echo._forward_pre_hooks


def test_objects_of_unknown_kinds_are_refused():
    echo = Echo()
    with pytest.raises(CallError, match="'extra' is a object"):
        record_selected(echo, [lambda: echo(X, 1, object())], count=1)


def test_arguments_that_are_no_tensors_are_recorded():
    echo = Echo()
    (call,) = record_selected(echo, [lambda: echo(X, 1, {"how": "much"})], count=4)
    assert call["extra"] == {"how": "much"}
    assert torch.equal(call["sample"], X)


def test_what_images_share_stays_with_its_timestep():
    """Of 3 values for 4 images each image has all; other timesteps may have others."""
    echo = Echo()
    tables = {t: torch.full((3,), float(t)) for t in (5, 4, 3)}
    tables[3] = tables[4]

    def run():
        for t, table in tables.items():
            echo(X, t, table)

    calls = list(record_selected(echo, [run], count=12, sampler="uniform"))
    assert {float(t) for call in calls for t in call["timestep"]} == {5, 4, 3}
    for call in calls:
        assert all(torch.equal(call["extra"], tables[int(t)]) for t in call["timestep"])


def test_bad_options_are_refused(tmp_path):
    echo = Echo()
    runs = [lambda: echo(X, 1)]
    with pytest.raises(RecipeError, match="unknown sampler 'best'"):
        record_selected(echo, runs, sampler="best")
    with pytest.raises(RecipeError, match="count=0"):
        record_selected(echo, runs, count=0)
    with pytest.raises(SettingError, match="byte_budget=-1"):
        record_selected(echo, runs, byte_budget=-1)
    (tmp_path / "0000.safetensors").write_bytes(b"")
    with pytest.raises(SettingError, match="already holds calls"):
        record_selected(echo, runs, folder=tmp_path)
