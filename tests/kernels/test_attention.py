"""Our attention against float64, at every level of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.kernels import layout
from fxquant.kernels.machine import LEVELS, cpu_features, detect
from fxquant.kernels.x86 import attention as kernel

pytestmark = pytest.mark.skipif(
    detect().arch != "x86_64" or detect().compiler is None, reason="needs x86-64 and a compiler"
)
ROW = torch.tensor([[0.02, 3.0], [0.015, -20.0], [0.03, 7.0], [0.01, -11.0]])
OPTIONAL = {"avx_vnni", "avx512_vnni", "avx512_bf16"}  # a level does without those it lacks
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.uint8: 5e-2}


def tokens(shape: tuple[int, ...], dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    """[B, heads, tokens, d] in the memory order that a linear layer leaves."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, count, d = shape
    x = torch.randn(batch, count, heads, d, generator=generator) * size
    if dtype == torch.uint8:
        x = (x * 40 + 128).round().clamp(0, 255)
    return x.to(dtype).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    out: torch.dtype | None = None,
) -> Tensor:
    indices = (0, 1, 2) if q.dtype == torch.uint8 else (-1, -1, -1)
    dtype = out or (torch.float32 if q.dtype == torch.uint8 else q.dtype)
    quantised = dtype in (torch.uint8, torch.int8)
    return kernel.attention(q, k, v, ROW, *indices, mask, scale, 3 if quantised else -1, 8, dtype)


def truth(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """In float64, of what the integers stand for."""
    if q.dtype == torch.uint8:
        rows = ROW.double()
        q, k, v = ((x.double() - 128 - r[1]) * r[0] for x, r in zip((q, k, v), rows, strict=False))
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        added = mask.double() if mask.dtype != torch.bool else torch.zeros(()).double()
        scores = scores + added
        scores = scores if mask.dtype != torch.bool else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v.double()


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, to a tenth of the values' size where these cancel."""
    least = 0.1 * expected.numel() ** 0.5
    return float((found.double() - expected).norm() / expected.norm().clamp(min=least))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([*TOLERANCE]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 150),
    keys=st.one_of(st.integers(1, 10), st.integers(180, 400)),
    d=st.integers(1, 40),
    value_d=st.integers(1, 20),
    size=st.sampled_from([0.0, 0.3, 3.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    d: int,
    value_d: int,
    size: float,
    seed: int,
) -> None:
    q = tokens((batch, heads, queries, d), dtype, seed, size)
    k = tokens((batch, heads, keys, d), dtype, seed + 1, size)
    v = tokens((batch, heads, keys, value_d), dtype, seed + 2)
    found = attend(q, k, v)
    assert found.stride() == layout.empty_heads(found.shape, found.dtype, found.device).stride()
    assert error(found, truth(q, k, v)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("d", [40, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("keys", [77, 640])
@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_the_heads_of_known_models(dtype: torch.dtype, keys: int, d: int) -> None:
    q, k, v = (tokens((2, 2, n, d), dtype, n) for n in (640, keys, keys))
    assert error(attend(q, k, v), truth(q, k, v)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*TOLERANCE])
@pytest.mark.parametrize(
    "shape", [(2, 2, 70, 90), (1, 1, 1, 90), (2, 1, 70, 90), (70, 90), (70, 1), (1,)]
)
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (tokens((2, 2, n, 16), dtype, n) for n in (70, 90, 90))
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert error(attend(q, k, v, allowed), truth(q, k, v, allowed)) <= TOLERANCE[dtype]
    added = torch.randn(shape).masked_fill(~allowed & (torch.arange(shape[-1]) > 0), -torch.inf)
    assert error(attend(q, k, v, added), truth(q, k, v, added)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_a_query_that_may_look_at_nothing_gets_zeros(dtype: torch.dtype) -> None:
    q, k, v = (tokens((1, 1, n, 16), dtype, n) for n in (5, 200, 200))
    mask = torch.ones(5, 200, dtype=torch.bool)
    mask[3] = False
    mask[2, :193] = False  # a whole block of keys
    found = attend(q, k, v, mask)
    assert torch.equal(found[0, 0, 3].float(), torch.zeros(16))
    assert error(found, truth(q, k, v, mask)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [0.0, 7.0, -0.5])
def test_any_scale(scale: float) -> None:
    q, k, v = (tokens((1, 2, n, 24), torch.float32, n) for n in (40, 300, 300))
    assert error(attend(q, k, v, scale=scale), truth(q, k, v, scale=scale)) <= 1e-5


def test_scores_that_would_overflow_a_naive_exponential() -> None:
    for value in (1e3, -1e3):
        q = torch.full((1, 1, 3, 8), value)
        k = torch.linspace(-1, 1, 250).view(1, 1, 250, 1).expand(1, 1, 250, 8).contiguous()
        v = tokens((1, 1, 250, 4), torch.float32, 0)
        found = attend(q, k, v)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, v[:, :, [-1 if value > 0 else 0]].expand(1, 1, 3, 4))


@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_integer_results_are_those_of_the_float_result(dtype: torch.dtype) -> None:
    q, k, v = (tokens((2, 2, n, 40), dtype, n) for n in (130, 77, 77))
    real = attend(q, k, v, out=torch.float32)
    for stored in (torch.uint8, torch.int8):
        q_out = (torch.round(real / ROW[3, 0]) + ROW[3, 1]).clamp(-128, 127)
        expected = (q_out + (128 if stored == torch.uint8 else 0)).to(stored)
        assert torch.equal(attend(q, k, v, out=stored), expected)


def test_eight_bit_weights_keep_the_sum_of_a_long_tail() -> None:
    """One key has weight 0.5, four thousand share the rest: each alone would round to nothing."""
    q = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    k = torch.full((1, 1, 4000, 1), 128, dtype=torch.uint8)
    k[0, 0, 0] = 255
    v = torch.full((1, 1, 4000, 1), 100, dtype=torch.uint8)
    v[0, 0, 0] = 200
    difference = float((255 - 128 - ROW[0, 1]) * ROW[0, 0] * (255 - 128) * ROW[1, 0])
    scale = float(torch.log(torch.tensor(3999.0))) / difference
    expected = truth(q, k, v, scale=scale)
    assert error(attend(q, k, v, scale=scale), expected) < 0.02
    assert abs(float(expected) - float(((150 - 128) - ROW[2, 1]) * ROW[2, 0])) < 0.01


def test_layouts_that_are_not_a_linear_layers() -> None:
    q, k, v = (tokens((2, 2, n, 16), torch.bfloat16, n) for n in (33, 50, 50))
    expected = attend(q, k, v)
    assert torch.equal(attend(q.contiguous(), k.contiguous(), v.contiguous()), expected)
    assert torch.equal(attend(q.mT.contiguous().mT, k, v), expected), "channels are strided"


def test_threads_change_nothing() -> None:
    q, k, v = (tokens((1, 3, n, 40), torch.bfloat16, n) for n in (300, 500, 500))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(attend(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, found[0]) for x in found)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(x, found[0]) for x in pool.map(lambda _: attend(q, k, v), range(8)))


@pytest.mark.parametrize("level", [*LEVELS])
def test_every_level(level: str, tmp_path: Path) -> None:
    if not LEVELS[level] - OPTIONAL <= cpu_features():
        pytest.skip(f"this CPU has no {level}")
    environment = {**os.environ, "FXQUANT_CPU": level, "FXQUANT_CACHE": str(tmp_path)}
    chosen = "heads_of_known_models and (40 or 96) or masks or integer_results or look_at_nothing"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
