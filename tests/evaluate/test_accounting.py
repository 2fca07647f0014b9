"""Bytes, bit operations and memory, against counts made another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant.evaluate.accounting import (
    PARTS,
    PeakMemory,
    bit_operations,
    float_bit_operations,
    peak_memory,
    size_by_part,
)
from fxquant.runtime.summary import size_in_bytes
from tests.runtime.compiled import float_toy, toy
from tests.toy import story

BATCH, SIDE, TOKENS = 2, 8, 7


def layer_macs() -> dict[str, int]:
    """MACs by layer of the float toy on the story's first call, from hooks on its modules."""
    macs: dict[str, int] = {}

    def watch(name: str, module: nn.Module):
        def hook(_module, _inputs, output):
            assert isinstance(module, nn.Conv2d | nn.Linear)
            macs[name] = output.numel() * module.weight[0].numel()

        return module.register_forward_hook(hook)

    layers = [
        (n, m) for n, m in float_toy().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    handles = [watch(n, m) for n, m in layers]
    with torch.no_grad():
        float_toy()(**story().signature.unflatten(story().calls[0]))
    for handle in handles:
        handle.remove()
    return macs


def is_float(name: str) -> bool:
    return name.startswith(("conv_in", "conv_out", "time_embedding"))


@pytest.mark.parametrize(("recipe", "bits"), [("w8a8-fast", 8), ("w4a8-fast", 4)])
def test_sizes(recipe, bits):
    model = toy(recipe)
    parts = size_by_part(model)
    assert list(parts) == list(PARTS)
    table = sum(b.nbytes for b in model.table.buffers())
    assert sum(parts.values()) == size_in_bytes(model.graph) + table
    layers = {
        name: m
        for name, m in float_toy().named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and not is_float(name)
    }
    assert parts["integer weights"] == sum(m.weight.numel() * bits // 8 for m in layers.values())
    assert parts["weight scales"] == sum(4 * m.weight.shape[0] for m in layers.values())
    assert parts["activation table"] == table > 0


@pytest.mark.parametrize(("recipe", "product"), [("w8a8-fast", 64), ("w4a8-fast", 32)])
def test_bit_operations(recipe, product):
    rows = {(r.kind, r.precision): r for r in bit_operations(toy(recipe), story().calls[0])}
    macs = layer_macs()
    integer = sum(v for name, v in macs.items() if not is_float(name))
    floats = sum(v for name, v in macs.items() if is_float(name))
    tokens = (SIDE // 2) ** 2
    attention = BATCH * 2 * tokens * (tokens + TOKENS) * (8 + 8)  # 2 heads of 8; self and cross
    assert {key: (r.macs, r.bit_operations) for key, r in rows.items()} == {
        ("layers", recipe[:4]): (integer, integer * product),
        ("layers", "float32"): (floats, floats * 1024),
        ("attention", "float32"): (attention, attention * 1024),
    }
    assert float_bit_operations(list(rows.values())) == (integer + floats + attention) * 1024


def test_bit_operations_grow_with_the_batch():
    whole, half = (
        sum(
            r.bit_operations
            for r in bit_operations(toy("w8a8-fast"), [t[:size] for t in story().calls[0]])
        )
        for size in (BATCH, 1)
    )
    assert whole == BATCH * half


def test_peak_memory_sees_a_buffer_and_nothing_of_a_small_call():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no Linux")
    held: list[torch.Tensor] = []
    found = peak_memory(lambda: torch.ones(64 << 20, dtype=torch.uint8).max())
    assert isinstance(found, PeakMemory)
    assert "VmHWM" in found.how
    assert 60 << 20 < found.bytes < 80 << 20
    small = peak_memory(lambda: held.append(torch.ones(16)))
    assert small is not None
    assert small.bytes < 4 << 20
    assert len(held) == 2  # the first call warms up


def test_peak_memory_is_unknown_where_the_mark_cannot_be_reset(monkeypatch):
    def refuse(*_args: object, **_kwargs: object):
        raise PermissionError("read-only /proc")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert peak_memory(lambda: None) is None
