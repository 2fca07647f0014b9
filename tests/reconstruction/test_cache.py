"""Stored activations: memory and files hold the same, within the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.reconstruction.cache import Cache, Stored, row_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def filled(cache: Cache, value: torch.Tensor, batch: int = 4, parts: int = 1) -> Stored:
    stored = None
    for start in range(0, len(value) // parts, batch):
        part = value[start * parts : (start + batch) * parts]
        stored = stored or cache.new(len(value) // parts, part, len(part) // parts)
        stored.write(start, part)
    assert stored is not None
    return stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_rows_come_back_in_any_order(dtype: torch.dtype, budget: int) -> None:
    value = torch.randn(10, 3, 2).mul(100).to(dtype)
    with Cache(budget) as cache:
        stored = filled(cache, value)
        assert stored.in_memory == (budget > 0)
        index = torch.tensor([9, 0, 3, 3])
        assert torch.equal(stored[index], value[index])


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_parts_of_a_sample_stay_together(budget: int) -> None:
    value = torch.arange(24.0).view(12, 2)  # 6 samples, 2 parts each
    with Cache(budget) as cache:
        stored = filled(cache, value, parts=2)
        expected = value.view(6, 2, 2)[torch.tensor([4, 1])].flatten(0, 1)
        assert torch.equal(stored[torch.tensor([4, 1])], expected)


def test_rows_are_contiguous_even_if_the_value_was_not() -> None:
    value = torch.randn(4, 8, 4, 4).to(memory_format=torch.channels_last)
    with Cache(1 << 20) as cache:
        assert filled(cache, value)[torch.arange(4)].is_contiguous()


def test_the_budget_counts_what_is_held_now(tmp_path: Path) -> None:
    value = torch.zeros(8, 16)
    size = 8 * row_bytes(value, 8)
    with Cache(int(2.4 * size), tmp_path) as cache:  # a share of it is for values
        first, second, third = (filled(cache, value) for _ in range(3))
        assert [s.in_memory for s in (first, second, third)] == [True, True, False]
        assert (cache.used, cache.peak, cache.spilled) == (2 * size, 2 * size, size)
        cache.drop(first)
        assert cache.used == size
        assert filled(cache, value).in_memory, "room that was given back is not used"
        cache.drop(third)
    assert not list(tmp_path.iterdir()), "files were left behind"


def test_a_spilled_value_leaves_no_file_to_forget(tmp_path: Path) -> None:
    with Cache(0, tmp_path) as cache:
        stored = filled(cache, torch.ones(4, 2))
        assert not [p for p in tmp_path.rglob("*") if p.is_file()], "a killed process leaves it"
        assert torch.equal(stored[torch.arange(4)], torch.ones(4, 2))
