"""Several Python threads may call one compiled model at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fxquant import QuantizedModel
from tests.runtime import compiled as c

THREADS, ROUNDS, CALLS = 4, 4, 3


def at_once(work: Sequence[Callable[[], list[Tensor]]]) -> list[list[Tensor]]:
    """What each returns, all started together on a thread each."""
    barrier = threading.Barrier(len(work))

    def run(one: Callable[[], list[Tensor]]) -> list[Tensor]:
        barrier.wait()
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(run, work))


def check(original: QuantizedModel, calls: list[list[c.Call]]) -> None:
    """Every thread gets, bit for bit, what one thread gets; first calls race to pack weights."""
    expected = [[c.result(original, call) for call in mine] for mine in calls]
    assert not torch.equal(expected[0][0], expected[1][0])
    for _ in range(ROUNDS):
        model = c.fresh(original)
        work = [lambda mine=mine, m=model: [c.result(m, call) for call in mine] for mine in calls]
        for got, wanted in zip(at_once(work), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
def test_threads_with_inputs_of_their_own_get_their_own_results(recipe: str) -> None:
    calls = [[c.mixed_call(3, seed=10 * t + i) for i in range(CALLS)] for t in range(THREADS)]
    check(c.toy(recipe), calls)


def test_threads_with_batches_and_sizes_of_their_own_get_their_own_results() -> None:
    sizes = [(1, (8, 8)), (2, (16, 4)), (33, (8, 8)), (4, (32, 32))]
    calls = [[c.mixed_call(n, size, seed=i) for i in range(CALLS)] for n, size in sizes]
    check(c.toy(), calls)


def test_threads_at_timesteps_of_different_groups_use_their_own_rows() -> None:
    model = c.compile_mite(c.float32(timestep_groups=4))
    assert model.table.values.shape[0] == THREADS
    calls = [
        [{**call, "timestep": torch.full((3,), 333.0 * t)} for call in c.mite_calls(CALLS, 3, t)]
        for t in range(THREADS)
    ]
    check(model, calls)
