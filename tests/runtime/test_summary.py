"""The summary says what became of every layer, which kernels run, and what it saved."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from torch import nn

from tests.runtime import compiled as c

KEPT = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]


def layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4"])
def test_every_layer_is_counted_once(bits: str) -> None:
    model, summary = c.float_toy(), c.toy(f"{bits}-fast").summary
    assert summary.precision == {"float": len(KEPT), bits: len(layers(model)) - len(KEPT)}
    assert summary.recipe == f"{bits}-fast"


def test_layers_that_stayed_float_are_named_with_the_reason() -> None:
    stayed = c.toy().summary.stayed_float
    assert sorted(layer for group in stayed.values() for layer in group) == KEPT
    assert all("recipe keeps" in reason for reason in stayed)
    assert stayed["recipe keeps conv_in float"] == ("conv_in",)


def test_kernels_are_those_of_the_graph() -> None:
    model = c.toy()
    ops = [n for n in model.graph.graph.nodes if str(n.target).startswith("fxquant.")]
    told = Counter(f"{str(n.target).split('.')[1]} {n.args[-1]}" for n in ops)
    assert model.summary.kernels == told
    assert sum(v for k, v in told.items() if k.split()[0] in ("linear", "conv2d")) == (
        len(layers(c.float_toy())) - len(KEPT)
    )


@pytest.mark.skipif(not c.FULL_SPEED, reason="the fast kernels need x86 with VNNI and a compiler")
def test_fast_kernels_are_named() -> None:
    with c.own_kernels():
        for recipe, kernel in (("w8a8-fast", "gemm"), ("w4a8-fast", "gemm_int4")):
            named = set(c.toy(recipe).summary.kernels)
            assert {f"conv2d {kernel}", f"linear {kernel}"} <= named


@pytest.mark.parametrize(("recipe", "most"), [("w8a8-fast", 0.45), ("w4a8-fast", 0.4)])
def test_bytes_are_those_of_the_tensors(recipe: str, most: float) -> None:
    summary, state = c.toy(recipe).summary, c.float_toy().state_dict()
    assert summary.bytes_before == sum(4 * tensor.numel() for tensor in state.values())
    after = c.toy(recipe).graph.state_dict().values()
    assert summary.bytes_after == sum(t.numel() * t.element_size() for t in after)
    assert 0 < summary.bytes_after < most * summary.bytes_before


def test_fewer_bits_take_fewer_bytes() -> None:
    assert c.toy("w4a8-fast").summary.bytes_after < c.toy().summary.bytes_after


def test_the_text_says_it_all() -> None:
    summary = c.toy().summary
    first, *rest = str(summary).splitlines()
    assert "w8a8-fast" in first
    assert f"{summary.precision['w8a8']} layers w8a8" in first
    assert f"{len(KEPT)} layers float" in first
    assert re.search(r"\d+\.\d -> \d+\.\d MiB", first)
    text = "\n".join(rest)
    assert all(layer in text for layer in KEPT)
    for kernel, count in summary.kernels.items():
        assert f"{count} x {kernel}" in text
    assert "capture" in text


def test_json_holds_the_same_and_survives_a_round_trip() -> None:
    summary = c.toy().summary
    told = json.loads(json.dumps(summary.to_json()))
    assert told["recipe"] == "w8a8-fast"
    assert told["precision"] == summary.precision
    assert told["kernels"] == summary.kernels
    assert (told["bytes_before"], told["bytes_after"]) == (
        summary.bytes_before,
        summary.bytes_after,
    )
    assert sorted(layer for group in told["stayed_float"].values() for layer in group) == KEPT
    assert told["fallbacks"] == list(summary.fallbacks)
    assert told["seconds"].keys() >= {"capture", "calibrate", "lower"}


def test_layers_without_a_kernel_are_called_simulated() -> None:
    summary = c.compile_mite(c.float32(activation_bits=16)).summary
    assert summary.precision == {"float": 2, "simulated": 2}
    assert any("no kernel" in reason for reason in summary.stayed_float)
    assert not [kernel for kernel in summary.kernels if "conv2d" in kernel]


def test_a_model_without_layers_has_a_summary() -> None:
    model = nn.Sequential(nn.SiLU())
    summary = c.compiled(model, [(c.mixed_call(2)["sample"],)]).summary
    assert (summary.bytes_before, summary.precision) == (0, {})
    assert "w8a8-fast" in str(summary)
