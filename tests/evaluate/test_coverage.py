"""Coverage adds up to the float model's own parameters and multiply-accumulates."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fxquant import Recipe
from fxquant.evaluate.coverage import coverage, macs, sizes
from fxquant.graph.nodes import CONSTANTS
from fxquant.recipe import Override
from tests.toy import story

MIXED = Recipe.parse("w4a8-fast").with_(overrides=(Override("down_resnet", weight_bits=16),))


def rows(recipe: Recipe | None = None):
    """Coverage of the toy, one image."""
    made = story(recipe)
    call = [t[:1] if t.ndim else t for t in made.calls[0]]
    return {row.precision: row for row in coverage(made["select_kernels"], call)}


@pytest.mark.parametrize("recipe", [None, MIXED], ids=["w8a8", "mixed"])
def test_multiply_accumulates_are_those_of_the_float_model(recipe):
    made = story(recipe)
    call = [t[:1] if t.ndim else t for t in made.calls[0]]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.graphs["capture"](*call)
    layers = counter.get_total_flops() // 2  # torch counts no attention on a CPU
    tokens, heads, width, prompt = 4 * 4, 2, 8, 7
    attention = heads * tokens * (tokens + prompt) * 2 * width
    assert sum(row.macs for row in rows(recipe).values()) == layers + attention


@pytest.mark.parametrize("recipe", [None, MIXED], ids=["w8a8", "mixed"])
def test_parameters_are_those_of_the_float_model(recipe):
    made = story(recipe)
    constants = {
        n.target: n.meta["val"].numel()
        for n in made["select_kernels"].graph.nodes
        if n.op == "get_attr" and str(n.target).startswith(CONSTANTS)
    }
    whole = sum(p.numel() for p in made.model.parameters())
    counted = sum(row.parameters for row in rows(recipe).values())
    assert counted == whole + sum(constants.values())


def test_precisions_are_apart():
    mixed = rows(MIXED)
    assert set(mixed) == {"w4a8", "w16a8 simulated", "to a8", "float32"}
    assert mixed["w16a8 simulated"].macs == 2 * 64 * 16 * 16 * 9 + 16 * 32
    assert mixed["w16a8 simulated"].parameters == 2 * (16 * 16 * 9 + 16) + 16 * 32 + 16
    assert mixed["to a8"].macs == 0
    assert mixed["to a8"].operators > 0


def test_sizes_follow_the_call():
    made = story()
    one, two = (
        sizes(made["select_kernels"], [t[:n] if t.ndim else t for t in made.calls[0]])
        for n in (1, 2)
    )
    layer = next(n for n in one if macs(n, one) and len(one[n]) == 4)
    assert macs(layer, two) == 2 * macs(layer, one)
