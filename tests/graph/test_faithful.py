"""Compiling compares the captured graph with its module, and refuses what is not a function."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import CallError, CaptureError
from fxquant.graph.faithful import UnfaithfulError, agrees, error
from tests.toy import relative_error


class Two(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))

    def between(self, h: Tensor) -> Tensor:
        return h


class Counting(Two):
    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls


class Dice(Two):
    def between(self, h: Tensor) -> Tensor:
        return h * random.random()


class AttendingDice(Two):
    """torch tags attention as random, which it is with dropout alone."""

    def between(self, h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(h, h, h) * random.random()


class Lonely(Two):
    def between(self, h: Tensor) -> Tensor:
        return h * 2 if h.shape[0] == 1 else h


class TimesTime(Two):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * t


def image(batch: int = 3, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(batch, 4, height, width)


@pytest.mark.parametrize("kind", [Counting, Dice, AttendingDice])
def test_what_is_no_function_of_its_inputs_is_refused(kind: type[Two]) -> None:
    with pytest.raises(UnfaithfulError, match=r"calls|besides its inputs"):
        fxquant.compile(kind().eval(), [(image(),)], progress=False)


def test_a_module_that_treats_one_sample_in_another_way_refuses_one() -> None:
    model = Lonely().eval()
    served = fxquant.compile(model, [(image(),)], progress=False)
    with torch.no_grad():
        x = image(2)
        assert relative_error(served(x), model(x)) < 0.05
    with pytest.raises(CallError, match="Lonely itself asks whether B > 1"):
        served(image(1))


def test_a_number_that_multiplies_stays_one_number_though_the_batch_is_as_wide() -> None:
    model = TimesTime().eval()
    served = fxquant.compile(model, [(image(8), 3), (image(8), 7)], progress=False)
    with torch.no_grad():
        for x, t in ((image(8), 5), (image(2), 5.5)):
            assert relative_error(served(x, t), model(x, t)) < 0.05


def test_the_summary_says_how_far_the_result_is_from_the_module() -> None:
    model, x = Two().eval(), image()
    served = fxquant.compile(model, [(x,)], progress=False)
    with torch.no_grad():
        assert served.summary.error == pytest.approx(relative_error(served(x), model(x)), rel=0.1)
    assert "relative error on the first calibration call" in str(served.summary)


def test_a_result_that_is_hardly_the_modules_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Cancelled(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - self.second(self.first(x * 1.0001))

    fxquant.compile(Cancelled().eval(), [(image(),)], progress=False)
    assert "hardly the module's result" in caplog.text


def test_errors_of_what_is_not_finite() -> None:
    a = torch.tensor([1.0, torch.inf, torch.nan])
    assert error(a, a) == 0
    assert error(torch.tensor([1.0, 2.0, torch.nan]), a) == float("inf")
    assert error(torch.ones(3), torch.ones(1, 3)) == float("inf")
    assert agrees(torch.ones(3) + 1e-4, torch.ones(3))
    assert not agrees(torch.ones(3) + 1e-2, torch.ones(3))


def test_nan_weights_are_refused_before_anything_is_captured() -> None:
    model = Two().eval()
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(CaptureError, match=r"weights second\.weight"):
        fxquant.compile(model, [(image(),)], progress=False)
