"""compile() is a function of its arguments: it repeats, takes any loader, leaves all else be."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fxquant import QuantizedModel
from fxquant.calibration import record
from fxquant.errors import FallbackError
from fxquant.kernels.machine import detect
from tests import models
from tests.runtime import compiled as c
from tests.toy import relative_error

full_speed = pytest.mark.skipif(
    not c.FULL_SPEED, reason="the fast kernels need x86 with VNNI and a compiler"
)


def assert_same(a: QuantizedModel, b: QuantizedModel, call: c.Call) -> None:
    """Bitwise equal weights, table and result."""
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    assert torch.equal(c.result(a, call), c.result(b, call))


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast", "w4a4-fast"])
def test_two_compilations_are_equal_bit_for_bit(recipe: str) -> None:
    first = c.compile_mite(recipe)
    torch.rand(3)  # another state of the global generator
    assert_same(first, c.compile_mite(recipe), c.mite_calls(seed=1)[1])


@pytest.mark.slow
def test_two_compilations_of_the_toy_are_equal_bit_for_bit() -> None:
    twice = [c.compiled(c.float_toy(), models.calls("toy", 3), "w4a8-fast") for _ in range(2)]
    assert_same(*twice, c.mixed_call(3))


def loaders() -> dict[str, Any]:
    """The same calls in every form that a loader can have."""
    model, calls = c.mite(), c.mite_calls()
    one_by_one = DataLoader(calls, batch_size=None)  # type: ignore[arg-type]
    return {
        "generator": (call for call in calls),
        "iterator": iter(calls),
        "tuples": [tuple(call.values()) for call in calls],
        "lists": [list(call.values()) for call in calls],
        "numbers": [{**call, "timestep": float(call["timestep"])} for call in calls],
        "with return_dict": [{**call, "return_dict": False} for call in calls],
        "DataLoader": one_by_one,
        "recorded": record(model, lambda: [model(**call) for call in calls]),
        "recorded by position": record(model, lambda: [model(*call.values()) for call in calls]),
    }


@pytest.mark.parametrize("kind", list(loaders()))
def test_every_kind_of_loader_gives_the_same_model(kind: str) -> None:
    loader = loaders()[kind]
    assert_same(c.compiled(c.mite(), loader, c.float32()), c.shared_mite(), c.mite_calls(seed=1)[1])


def test_a_shuffled_dataset_of_single_samples_gives_the_same_ranges() -> None:
    samples = [
        {"sample": x, "timestep": call["timestep"]}
        for call in c.mite_calls()
        for x in call["sample"]
    ]
    generator = torch.Generator().manual_seed(0)
    loader: DataLoader[Any] = DataLoader(samples, 3, shuffle=True, generator=generator)  # type: ignore[arg-type]
    table = c.compiled(c.mite(), loader, c.float32()).table
    torch.testing.assert_close(table.values, c.shared_mite().table.values)


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
def test_the_original_is_unchanged(recipe: str) -> None:
    model = c.mite().train()
    model.norm.eval()
    model.conv.requires_grad_(requires_grad=False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    identities = [id(p) for p in model.parameters()]
    quantised = c.compile_mite(recipe, model)
    c.result(quantised, c.mite_calls()[0])
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_original_and_the_compiled_model_share_no_tensor() -> None:
    model, call = c.mite(), c.mite_calls()[1]
    quantised = c.compile_mite(c.float32(), model)
    before, mine = c.result(quantised, call), c.result(model, call)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(c.result(quantised, call), before)  # training the original on
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(1.0)
    quantised.requires_grad_(requires_grad=False)
    quantised.load_state_dict(c.compile_mite(c.float32(), c.mite(seed=1)).state_dict())
    torch.testing.assert_close(c.result(model, call), mine)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_global_generator_and_the_calls_are_left_alone() -> None:
    state, calls = torch.get_rng_state(), c.mite_calls()
    before = copy.deepcopy(calls)
    c.compiled(c.mite(), calls)
    assert torch.equal(torch.get_rng_state(), state)
    for call, kept in zip(calls, before, strict=True):
        assert all(torch.equal(call[name], kept[name]) for name in kept)


def test_calls_may_differ_in_batch_and_size() -> None:
    calls = [
        {"sample": torch.randn(batch, 4, size, size), "timestep": torch.tensor(t)}
        for batch, size, t in ((1, 6, 0.0), (70, 8, 500.0), (2, 16, 999.0))
    ]
    model, call = c.mite(), c.mite_calls(seed=1)[1]
    quantised = c.compiled(model, calls, c.float32())
    assert relative_error(c.result(quantised, call), c.result(model, call)) < 0.05


@full_speed
@pytest.mark.parametrize("make", [c.toy, c.shared_mite, lambda: c.unconditional()[1]])
def test_nothing_falls_back_on_this_machine(make: Any) -> None:
    assert make().summary.fallbacks == ()


@full_speed
@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast", "w4a4-fast"])
def test_strict_passes_on_this_machine(recipe: str) -> None:
    assert c.compile_mite(recipe, strict=True).summary.fallbacks == ()


@pytest.fixture
def generic_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU without any vector extension, and no compiler."""
    monkeypatch.setenv("FXQUANT_CPU", "generic")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    detect.cache_clear()
    yield
    monkeypatch.undo()
    detect.cache_clear()


@pytest.mark.usefixtures("generic_cpu")
def test_strict_lists_what_would_be_slow() -> None:
    with pytest.raises(FallbackError, match="strict=True") as refusal:
        c.compile_mite(strict=True)
    first, *nodes = str(refusal.value).splitlines()
    assert "would not run as planned" in first
    layers = [line for line in nodes if "not gemm: " in line]
    (names,) = (line.split(": ")[0].split(", ") for line in layers)  # of one reason
    assert len(names) == 2  # a linear and a convolution
    assert any("linear" in name for name in names)
    assert all("there is no C++ compiler" in line for line in nodes)
    assert all("not onednn: the CPU has no VNNI" in line for line in layers)


@pytest.mark.usefixtures("generic_cpu")
def test_without_strict_the_reference_serves_and_the_summary_says_so() -> None:
    model, call = c.mite(), c.mite_calls(seed=1)[1]
    quantised = c.compile_mite(c.float32(), model)
    assert quantised.summary.kernels["conv2d reference"] == 1
    assert any("no VNNI" in text for text in quantised.summary.fallbacks)
    assert "fallback: " in str(quantised.summary)
    assert relative_error(c.result(quantised, call), c.result(model, call)) < 0.05


@pytest.mark.usefixtures("generic_cpu")
def test_a_reference_that_was_asked_for_is_no_fallback() -> None:
    assert c.compile_mite(backend="reference", strict=True).summary.fallbacks == ()
