"""The whole loop on the toy: better than rounding to nearest, bitwise resumable, within budgets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.graph.nodes import attribute
from fxquant.graph.signature import Signature
from fxquant.passes.lower.integer_layers import integer_weight
from fxquant.quant.uniform import per_channel
from fxquant.recipe import Recipe
from fxquant.reconstruction.checkpoint import Checkpoints
from fxquant.reconstruction.reconstruct import Reconstructed, bypassed, reconstruct
from fxquant.reconstruction.settings import Reconstruction
from fxquant.reconstruction.stream import Samples
from fxquant.reconstruction.subgraph import units
from tests import models
from tests.toy import Story, relative_error, story

W4A8 = Recipe.parse("w4a8-fast")
SHORT = Reconstruction(iters=60, batch=4, samples=24)


def toy() -> Story:
    return story(W4A8)


def samples(count: int = 24, seed: int = 1) -> Samples:
    _, signature = toy().model, toy().signature
    calls = [flat(signature, c) for c in models.calls("toy", count // 2, 2, seed)]
    tensors = tuple(torch.cat([c[k] for c in calls]) for k in range(len(calls[0])))
    return Samples(tensors, torch.zeros(count, dtype=torch.int64))


def flat(signature: Signature, call: dict[str, Any]) -> list[Tensor]:
    return signature.flatten((), call)


def run(settings: Reconstruction = SHORT, **options: Any) -> Reconstructed:
    fake = toy().fake
    return reconstruct(fake.graph, fake.table, samples(), settings, **options)


def error(result: Reconstructed | None) -> float:
    """Relative error of the whole model to the float one, on other samples."""
    fake, other = toy().fake, samples(8, seed=9)
    graph, table = (result.graph, result.table) if result else (fake.graph, fake.table)
    with torch.no_grad():
        quantised = graph(*other.tensors, table.row(0))
        exact = bypassed(fake.graph)(*other.tensors, table.row(0))
    return relative_error(quantised, exact)


def weights(result: Reconstructed) -> list[tuple[Tensor, Tensor, int]]:
    """(weight, scale, bits) of every quantised layer."""
    return [
        (
            attribute(result.graph, str(n.args[0].target)),
            attribute(result.graph, str(n.args[1].target)),
            n.args[2],
        )
        for unit in units(result.graph)
        for n in unit.weights
    ]


def assert_same(a: Reconstructed, b: Reconstructed) -> None:
    for (x, _, _), (y, _, _) in zip(weights(a), weights(b), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a.table.values, b.table.values)


@pytest.mark.parametrize("loss", ["fbr", "block", "layer"])
def test_it_beats_rounding_to_nearest(loss: str) -> None:
    result = run(Reconstruction(iters=100, batch=4, samples=24, loss=loss))
    assert error(result) < 0.9 * error(None)
    assert all(unit.loss_after <= unit.loss_before for unit in result.units)
    assert sum(unit.loss_after < unit.loss_before for unit in result.units) > 5


def test_weights_end_on_the_integer_grid() -> None:
    for weight, scale, bits in weights(run()):
        assert bits == 4
        step = per_channel(scale, weight.ndim, 0)
        integers = torch.round(weight / step)
        assert torch.equal(integers * step, weight)
        assert int(integers.min()) >= -8
        assert int(integers.max()) <= 7
        packed = integer_weight(weight, scale, bits)
        assert packed.dtype == torch.uint8


def test_inputs_are_left_as_they_are() -> None:
    fake = toy().fake
    before = {k: v.clone() for k, v in fake.graph.state_dict().items()}
    table = fake.table.values.clone()
    result = run()
    assert all(torch.equal(v, before[k]) for k, v in fake.graph.state_dict().items())
    assert torch.equal(fake.table.values, table)
    assert not torch.equal(result.table.values[..., 0], table[..., 0])
    assert torch.equal(result.table.values[..., 1], table[..., 1])


def test_a_memory_budget_changes_where_values_are_and_nothing_else() -> None:
    """Beyond its budget the cache uses files, and inner targets are computed again."""
    assert_same(run(memory_budget=1 << 30), run(memory_budget=1 << 30))
    spilled, held = run(memory_budget=1), run(memory_budget=1 << 30)
    for a, b in zip(spilled.units, held.units, strict=True):
        assert a.loss_before == pytest.approx(b.loss_before, rel=0.05)
    assert error(spilled) < 0.9 * error(None)


def test_another_seed_is_another_run() -> None:
    first, second = run(seed=0), run(seed=1)
    assert any(
        not torch.equal(x[0], y[0]) for x, y in zip(weights(first), weights(second), strict=True)
    )


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    class KilledError(Exception):
        pass

    class Killing(Checkpoints):
        def write(self, number: int, trained: Any) -> None:
            if number == stop:
                raise KilledError
            super().write(number, trained)

    with pytest.raises(KilledError):
        run(checkpoints=Killing(tmp_path, {"run": 1}))
    assert len(list(tmp_path.glob("unit_*.safetensors"))) == stop
    assert_same(run(checkpoints=Checkpoints(tmp_path, {"run": 1})), run())


def test_finished_units_are_not_trained_again(tmp_path: Path) -> None:
    first = run(checkpoints=Checkpoints(tmp_path, {}))
    again = run(checkpoints=Checkpoints(tmp_path, {}))
    assert again.units == first.units, "reports, seconds included, come from the checkpoints"
    assert_same(first, again)


def test_a_time_budget_is_met() -> None:
    long = Reconstruction(iters=100_000, batch=4, samples=24)
    started = time.perf_counter()
    result = run(long, time_budget=4.0)
    assert time.perf_counter() - started < 20
    assert all(0 < unit.iters < 100_000 for unit in result.units)
    assert error(result) <= error(None)
