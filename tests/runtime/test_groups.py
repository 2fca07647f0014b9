"""With timestep groups the row of the activation table follows the value of the timestep."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

from fxquant import QuantizedModel
from fxquant.errors import RecipeError
from tests.runtime import compiled as c
from tests.toy import relative_error

GROUPS = 4
CALIBRATED = 12  # timesteps 0, 91, ..., 999: three a group


@functools.cache
def grouped() -> QuantizedModel:
    return c.compiled(c.mite(), c.mite_calls(CALIBRATED), c.float32(timestep_groups=GROUPS))


def call_at(*timesteps: float, seed: int = 5) -> c.Call:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(len(timesteps), 4, 8, 8, generator=generator)
    return {"sample": sample, "timestep": torch.tensor(timesteps)}


def with_row(model: QuantizedModel, call: c.Call, row: int) -> Tensor:
    """The result with a row chosen by hand."""
    with torch.no_grad():
        return model.graph(*model.signature.flatten((), call), model.table.row(row))


def test_each_group_has_a_row_of_its_own() -> None:
    table = grouped().table
    assert table.values.shape[0] == GROUPS
    assert table.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert table.timesteps.tolist() == torch.linspace(0, 999, CALIBRATED).round().tolist()
    scales = table.values[:, :, 0]
    assert len({tuple(row.tolist()) for row in scales}) == GROUPS


@pytest.mark.parametrize(
    ("timestep", "row"),
    [(0, 0), (182, 0), (226, 0), (228, 1), (450, 1), (499, 1), (500, 2), (727, 2), (999, 3)],
)
def test_the_row_is_that_of_the_nearest_calibrated_timestep(timestep: int, row: int) -> None:
    model, call = grouped(), call_at(timestep, timestep)
    result = c.result(model, call)
    assert torch.equal(result, with_row(model, call, row))
    others = [with_row(model, call, r) for r in range(GROUPS) if r != row]
    assert not any(torch.equal(result, other) for other in others)


@pytest.mark.parametrize("timestep", [0, 226, 500, 999])
@pytest.mark.parametrize("kind", [int, torch.tensor, lambda t: torch.tensor([t])])
def test_one_timestep_for_a_batch_is_one_for_each_sample(timestep: int, kind: Any) -> None:
    model, call = grouped(), call_at(timestep, timestep)
    one = {**call, "timestep": kind(timestep)}
    assert model.signature.has_one_timestep((), one)
    assert not model.signature.has_one_timestep((), call)
    assert torch.equal(c.result(model, one), c.result(model, call))


def test_the_order_of_calls_does_not_matter() -> None:
    model = c.fresh(grouped())
    calls = [call_at(t, t) for t in (999.0, 0.0, 500.0, 500.0, 300.0)]
    forth = [c.result(model, call) for call in calls]
    back = [c.result(model, call) for call in reversed(calls)]
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))


def test_a_call_that_mixes_groups_equals_the_separate_calls() -> None:
    model = grouped()
    call = call_at(999, 0, 500, 10, 998, 300, 501, 0)
    together = c.result(model, call)
    apart = torch.cat([c.result(model, c.part(call, i, i + 1)) for i in range(8)])
    assert max(c.errors(together, apart)) < 1e-3
    for row in range(GROUPS):
        assert max(c.errors(with_row(model, call, row), apart)) > 1e-3


def test_grouped_rows_are_nearer_to_the_original_than_one_row() -> None:
    model, calls = c.mite(), c.mite_calls(CALIBRATED, batch=16)
    call = {
        "sample": torch.cat([call["sample"] for call in calls]),
        "timestep": torch.cat([call["timestep"].expand(16) for call in calls]),
    }
    four = c.compiled(model, calls, c.float32("w4a4-fast", timestep_groups=GROUPS, weight_bits=8))
    one = c.compiled(model, calls, c.float32("w4a4-fast", weight_bits=8))
    expected = c.result(model, call)
    error = relative_error(c.result(one, call), expected)
    assert relative_error(c.result(four, call), expected) < 0.9 * error


# Heun calls twice at a timestep; PNDM does so once, and Euler has fractional timesteps.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDIMScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (HeunDiscreteScheduler, {}),
        (EulerDiscreteScheduler, {}),
    ],
)
@pytest.mark.parametrize("steps", [3, 7])
def test_samplers_with_other_steps_and_repeated_timesteps_are_served(
    scheduler: Any, options: dict[str, Any], steps: int
) -> None:
    def final(model: nn.Module) -> Tensor:
        schedule = scheduler(**options)
        schedule.set_timesteps(steps)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        x = x * schedule.init_noise_sigma
        for t in schedule.timesteps:
            call = {"sample": schedule.scale_model_input(x, t), "timestep": t}
            x = schedule.step(c.result(model, call), t, x).prev_sample
        return x

    assert relative_error(final(grouped()), final(c.mite())) < 0.1


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_timestep_outside_the_range_uses_the_nearest_end_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = [call for call in c.mite_calls(CALIBRATED) if 100 < call["timestep"] < 900]
    model = c.compiled(c.mite(), calls, c.float32(timestep_groups=2))
    c.result(model, call_at(182, 817))
    assert not warned(caplog)
    for timestep, row in ((50.0, 0), (999.0, 1), (0.0, 0)):
        call = call_at(timestep, timestep)
        assert torch.equal(c.result(model, call), with_row(model, call, row))
    (message,) = warned(caplog)
    assert "[182, 817]" in message
    assert "Calibrate" in message


def test_one_group_never_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = c.compiled(c.mite(), c.mite_calls()[1:3], c.float32())
    assert model.table.values.shape[0] == 1
    c.result(model, call_at(0, 999))
    assert not warned(caplog)


def test_a_deep_copy_keeps_rows_and_timesteps() -> None:
    call = call_at(999, 0, 500)
    assert torch.equal(c.result(c.fresh(grouped()), call), c.result(grouped(), call))


def test_as_many_groups_as_timesteps_are_served_and_no_more() -> None:
    model = c.compiled(c.mite(), c.mite_calls(2), c.float32(timestep_groups=2))
    call = call_at(0, 999)
    assert relative_error(c.result(model, call), c.result(c.mite(), call)) < 0.05
    with pytest.raises(RecipeError, match=r"have 2 distinct timesteps: .*timestep_groups=2"):
        c.compiled(c.mite(), c.mite_calls(2), c.float32(timestep_groups=3))


def test_groups_without_a_timestep_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    message = "timestep_groups=4, but the model has no timestep: set timestep_groups=1"
    with pytest.raises(RecipeError, match=message):
        c.compiled(model, [(x,)], c.float32(timestep_groups=GROUPS))
    quantised = c.compiled(model, [(x,)], c.float32(timestep_groups=1))
    assert relative_error(quantised(x), model(x).detach()) < 0.05
