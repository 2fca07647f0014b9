"""The Python face of the CUTLASS libraries, and whole graphs lowered for a GPU, without one.

The libraries are the drivers' own code, played by the CPU: cutlass_oracle.cpp, cuda_on_cpu/.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import OperandError
from fxquant.graph import runner
from fxquant.graph.options import Options
from fxquant.kernels import pack, reference
from fxquant.kernels.cutlass import gemm
from fxquant.kernels.cutlass.gemm import INT4, INT8, W4A4
from fxquant.kernels.int4 import pack_int4
from fxquant.kernels.machine import Machine
from fxquant.passes.pipelines import BIND
from fxquant.recipe import Recipe
from fxquant.runtime.placement import place
from tests.kernels import test_cutlass_oracle as oracle
from tests.kernels.cuda_on_cpu import compile as on_cpu
from tests.toy import relative_error, story

pytestmark = oracle.pytestmark
bounded = settings(max_examples=40, deadline=None, derandomize=True, database=None)
AMPERE = "8.0"


@functools.cache
def libraries() -> dict[str, Any]:
    """The producers, and the smallest tile of every kind."""
    folder = Path(oracle.folder().name) / "producers"
    folder.mkdir()
    sources = [on_cpu.SOURCES / "producers.cu", on_cpu.SOURCES / "weights.cu"]
    tiles = {tile.name: oracle.played(tile) for tile in oracle.SMALLEST.values()}
    return {**on_cpu.compiled(sources, folder), **tiles}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors count as those of a GPU that has the libraries."""
    found = frozenset(libraries())
    on_cpu.play_gpu(monkeypatch, libraries())
    monkeypatch.setattr(gemm, "_gpu", lambda device: (found, "a CPU that plays", 4))
    gemm._library.cache_clear()
    yield
    gemm._library.cache_clear()


def integers(seed: int, bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def floats(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = {"s8": (INT8, 8, 8), "s8s4": (INT4, 8, 4), "s4": (W4A4, 4, 4)}
ROW = torch.tensor([[0.031, -7.0], [0.4, 5.0]])
kinds = st.sampled_from([*KINDS])
outs = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8])
activations = st.sampled_from(["none", "silu", "gelu", "gelu_tanh"])


def close(got: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    if exact:
        assert torch.equal(got, expected)
    elif got.dtype == torch.int8:
        assert (got.int() - expected.int()).abs().max() <= 1
    else:
        bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[got.dtype]
        assert torch.allclose(got.float(), expected.float(), rtol=bound, atol=bound)


@bounded
@given(
    kind=kinds, out=outs, activation=activations, rows=st.integers(1, 70),
    k=st.integers(1, 100), n=st.integers(1, 70), residual=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_linear(
    kind: str, out: torch.dtype, activation: str, rows: int, k: int, n: int, residual: bool,
    seed: int,
) -> None:  # fmt: skip
    products, x_bits, weight_bits = KINDS[kind]
    x, natural = integers(seed, x_bits, 2, rows, k), integers(seed + 1, weight_bits, n, k)
    weight = natural if weight_bits > 4 else pack_int4(natural)
    arguments = (
        x, ROW, 0, weight, floats(seed, n).abs() + 0.1, floats(seed + 2, n), weight_bits,
        activation, floats(seed, 2, rows, n).half() if residual else None,
        1 if out == torch.int8 else -1, 8, out,
    )  # fmt: skip
    expected = reference.linear(*arguments)
    close(products.linear(*arguments), expected, exact=activation == "none")


@bounded
@given(
    kind=kinds, out=outs, channels=st.integers(1, 40), n=st.integers(1, 40),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)), kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2), sides=st.tuples(*[st.integers(0, 2)] * 4), add=st.booleans(),
    residual=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_conv2d(
    kind: str, out: torch.dtype, channels: int, n: int, size: tuple[int, int], kernel: int,
    stride: int, sides: tuple[int, ...], add: bool, residual: bool, seed: int,
) -> None:  # fmt: skip
    products, x_bits, weight_bits = KINDS[kind]
    x = integers(seed, x_bits, 2, channels, *size).to(memory_format=torch.channels_last)
    natural = integers(seed + 1, weight_bits, n, channels, kernel, kernel)
    weight = natural if weight_bits > 4 else pack_int4(natural)
    if kind == "s8" and seed % 2:
        weight = weight.to(memory_format=torch.channels_last)
    tail = (1 if out == torch.int8 else -1, 8, out)
    head = (
        x, ROW, 0, weight, floats(seed, n).abs() + 0.1, floats(seed + 2, n), weight_bits,
        [kernel, kernel], [stride, stride], list(sides), [1, 1], 1,
        floats(seed + 3, 2, n).bfloat16() if add else None, "none",
    )  # fmt: skip
    plain = reference.conv2d(*head, None, *tail)
    other = floats(seed + 4, *plain.shape).half() if residual else None
    arguments = (*head, other, *tail)
    close(products.conv2d(*arguments), reference.conv2d(*arguments), exact=True)


@pytest.mark.parametrize("activation", ["geglu", "geglu_tanh"])
@pytest.mark.parametrize("out", [torch.int8, torch.float16])
def test_geglu(activation: str, out: torch.dtype) -> None:
    arguments = (
        integers(0, 8, 2, 9, 48), ROW, 0, integers(1, 8, 64, 48), floats(2, 64).abs() / 100,
        floats(3, 64), 8, activation, None, 1 if out == torch.int8 else -1, 8, out,
    )  # fmt: skip
    close(INT8.linear(*arguments), reference.linear(*arguments), exact=False)


def test_a_weight_that_lies_right_is_not_copied_and_not_kept() -> None:
    before = pack.count()
    weight = integers(0, 8, 32, 32, 3, 3).to(memory_format=torch.channels_last)
    form = INT8.prepare(weight, 8, 32, (3, 3))
    assert form.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(form.sums[0], weight.int().sum((1, 2, 3)).int())
    nibbles = pack_int4(integers(0, 4, 32, 64))
    assert INT4.prepare(nibbles, 4, 64, (1, 1)).weight.data_ptr() == nibbles.data_ptr()
    assert INT4.prepare(pack_int4(integers(0, 4, 32, 9 * 32)), 4, 32, (3, 3)).weight.numel() == 0
    del weight, nibbles, form
    assert pack.count() == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.zeros(4, 16, dtype=torch.uint8)}, "activations are int8 on a GPU"),
        ({"x": torch.zeros(4, 16, dtype=torch.int8, device="meta")}, "all tensors go on one GPU"),
        ({"row": ROW.double()}, "the row is contiguous float32"),
        ({"x_index": 2}, "quantiser 2 is not in a row of 2"),
        ({"out_index": 7, "out_dtype": torch.int8}, "quantiser 7 is not in a row of 2"),
        ({"out_dtype": torch.float64}, "does not write torch.float64"),
        ({"out_dtype": torch.int8}, "does not write torch.int8"),
        ({"weight": torch.zeros(8, 16)}, "16 weights per channel take torch.int8"),
        ({"weight": torch.zeros(8, 15, dtype=torch.int8)}, "16 weights per channel take"),
        ({"weight_bits": 4}, "16 weights per channel take torch.uint8"),
        ({"weight_scale": torch.ones(9)}, "weight_scale is .9."),
        ({"bias": torch.ones(7)}, "bias is .7."),
        ({"bias": torch.ones(8, device="meta")}, "bias is on meta"),
        ({"residual": torch.zeros(5, 8)}, "residual is .5, 8., not .4, 8."),
        ({"activation": "relu"}, "no activation 'relu'"),
        ({"activation": "geglu", "residual": torch.zeros(4, 8)}, "takes no residual"),
        ({"weight_bits": 8, "x": torch.zeros(4, 70000, dtype=torch.int8),
          "weight": torch.zeros(8, 70000, dtype=torch.int8)}, "does not take these sizes"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_refused_before_a_launch(
    changed: dict[str, Any], said: str
) -> None:
    good = {
        "x": torch.zeros(4, 16, dtype=torch.int8), "row": ROW, "x_index": 0,
        "weight": torch.zeros(8, 16, dtype=torch.int8), "weight_scale": torch.ones(8),
        "bias": None, "weight_bits": 8, "activation": "none", "residual": None, "out_index": -1,
        "out_bits": 8, "out_dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises(OperandError, match=said):
        INT8.linear(**{**good, **changed})
    assert INT8.linear(**good).shape == (4, 8), "the library still works"


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast", "w4a4-fast"])
def test_the_toy_unet_runs_as_it_would_on_a_gpu(recipe: str) -> None:
    """The graph lowered for a GPU, every kernel of it, against the same graph on the reference."""
    parsed = Recipe.parse(recipe)
    known = Machine.named("cuda-sm80")
    machine = replace(known, cuda_kernels=known.cuda_kernels & frozenset(libraries()))
    on_gpu = Options(parsed, machine, device="cuda")
    lowered = story(parsed)["fuse_requantize"]
    bound = runner.run(BIND, lowered, on_gpu)
    place(bound, torch.device("cpu"))
    taken = {str(n.args[-1]) for n in bound.graph.nodes if str(n.target).startswith("fxquant.")}
    assert taken <= {"cutlass", "cutlass_int4", "cutlass_w4a4", "cuda", "sdpa"}
    slow = runner.run(BIND, lowered, replace(on_gpu, backend="reference"))
    got, expected = story(parsed).run(bound), story(parsed).run(slow)
    floats_ = story(parsed).run(story(parsed)["strip_noops"])
    assert relative_error(got, floats_) <= 1.1 * relative_error(expected, floats_) + 1e-3
