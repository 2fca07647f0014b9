"""A byte budget: what fits stays in memory, what does not goes to files."""

from __future__ import annotations

import pytest
import torch

from fxquant.calibration.spill import Spill
from fxquant.errors import LoaderError
from fxquant.graph.structure import FlatCall


def numbers(value: float) -> FlatCall:
    return FlatCall.of({"x": torch.full((100,), float(value))})  # 400 bytes


def held(call: FlatCall) -> torch.Tensor:
    return call.tensors["x"]


def test_up_to_the_budget_nothing_is_written(tmp_path):
    spill = Spill(800, tmp_path / "new")
    spill[0], spill[1] = numbers(0), numbers(1)
    assert (len(spill), spill.folder) == (2, None)
    assert not (tmp_path / "new").exists()


def test_beyond_it_everything_is_in_files(tmp_path):
    spill = Spill(800, tmp_path)
    for k in range(4):
        spill[k] = numbers(k)
    assert (len(spill), spill.folder) == (4, tmp_path)
    names = [file.name for file in sorted(tmp_path.iterdir())]
    assert names == [f"000{k}.safetensors" for k in range(4)]
    assert all(torch.equal(held(spill[k]), held(numbers(k))) for k in range(4))


@pytest.mark.parametrize("budget", [10**6, 0], ids=["memory", "files"])
def test_nesting_and_constants_come_back(budget):
    spill = Spill(budget)
    given = {"x": torch.ones(3), "more": {"ids": [torch.zeros(2), 0.5], "mode": "a", "none": None}}
    spill[0] = FlatCall.of(given)
    assert spill[0].skeleton == FlatCall.of(given).skeleton
    assert spill[0].constants == {"more.ids.1": 0.5, "more.mode": "a", "more.none": None}
    assert torch.equal(spill[0].arguments()["more"]["ids"][0], torch.zeros(2))


@pytest.mark.parametrize("budget", [10**6, 0], ids=["memory", "files"])
def test_what_is_put_again_replaces(budget):
    spill = Spill(budget)
    spill[0], spill[1], spill[0] = numbers(0), numbers(1), numbers(2)
    assert len(spill) == 2
    assert torch.equal(held(spill[0]), held(numbers(2)))
    assert torch.equal(held(spill[1]), held(numbers(1)))


def test_replacing_does_not_count_twice():
    spill = Spill(800)
    for value in range(10):
        spill[0] = numbers(value)
    assert spill.folder is None


def test_what_is_not_there_is_a_key_error_and_what_went_is_named(tmp_path):
    spill = Spill(0, tmp_path)
    spill[0] = numbers(0)
    with pytest.raises(KeyError):
        spill[1]
    (tmp_path / "0000.safetensors").unlink()
    with pytest.raises(LoaderError, match=r"0000\.safetensors"):
        spill[0]
