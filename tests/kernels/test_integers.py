"""The integer truth: every kernel gives the reference's sums, bit for bit.

A kernel's sum is seen through unit scales in a float32 output, which is exact below 2^24: with
factors up to 255 and 128 that is 514 products.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.kernels import reference
from fxquant.kernels.int4 import pack_int4
from tests.kernels import cases

pytestmark = pytest.mark.skipif(
    not cases.layer_kernels(), reason="only the reference runs on this machine"
)
bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)
extremes = st.sampled_from(["random", "low", "high", "alternating"])
zero_points = st.one_of(st.sampled_from([-128, -1, 0, 127]), st.integers(-128, 127))


def filled(kind: str, *shape: int, seed: int, bits: int = 8) -> Tensor:
    """Int8 values of ``bits`` bits: random, or at the ends of the range."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if kind == "random":
        return cases.integers(*shape, seed=seed) >> (8 - bits)
    flat = torch.full((torch.Size(shape).numel(),), low if kind == "low" else high)
    if kind == "alternating":
        flat[::2] = low
    return flat.view(shape).to(torch.int8)


def stored(q: Tensor) -> Tensor:
    return (q.int() + 128).to(torch.uint8)


def linear_sums(kernel: str, q: Tensor, zero_point: int, weight: Tensor, bits: int) -> Tensor:
    unit = torch.ones(weight.shape[0])
    row = cases.row((1.0, float(zero_point)))
    end = ("none", None, -1, 8, torch.float32)
    return cases.call("linear", kernel, stored(q), row, 0, weight, unit, None, bits, *end)


@bounded
@given(
    batch=st.sampled_from([(1,), (3,), (64,), (3, 5), (2, 1, 7)]),
    k=st.integers(1, 514),
    n=st.integers(1, 70),
    kinds=st.tuples(extremes, extremes),
    zero_point=zero_points,
    bits=st.sampled_from([8, 4]),
)
def test_linear_sums(
    batch: tuple[int, ...], k: int, n: int, kinds: tuple[str, str], zero_point: int, bits: int
) -> None:
    q = filled(kinds[0], *batch, k, seed=k)
    weight = filled(kinds[1], n, k, seed=n, bits=bits)
    expected = (q.long() - zero_point) @ weight.long().T
    given_ = pack_int4(weight) if bits == 4 else weight
    row = cases.row((1.0, float(zero_point)))
    assert torch.equal(reference.accumulate_linear(stored(q), row, 0, given_, bits), expected)
    assert torch.equal(reference.accumulate_linear(q, row, 0, given_, bits), expected)
    for kernel in cases.layer_kernels(bits):
        sums = linear_sums(kernel, q, zero_point, given_, bits)
        assert torch.equal(sums.long(), expected), kernel


@pytest.mark.parametrize("kernel", cases.layer_kernels())
@pytest.mark.parametrize("kind", ["random", "low", "high"])
def test_linear_sums_of_a_long_row_are_exact_slice_by_slice(kind: str, kernel: str) -> None:
    k, n, zero_point = 2880, 40, -128
    q, weight = filled("high", 3, k, seed=1), filled(kind, n, k, seed=2)
    for begin in range(0, k, 512):
        part = torch.zeros_like(weight)
        part[:, begin : begin + 512] = weight[:, begin : begin + 512]
        expected = (q.long() - zero_point) @ part.long().T
        assert torch.equal(linear_sums(kernel, q, zero_point, part, 8).long(), expected)


@bounded
@given(
    batch=st.sampled_from([1, 3]),
    c=st.integers(1, 57),
    n=st.integers(1, 40),
    size=st.tuples(st.integers(3, 13), st.integers(3, 13)),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (1, 1, 2, 2), (2, 0, 1, 3)]),
    kinds=st.tuples(extremes, extremes),
    zero_point=zero_points,
    bits=st.sampled_from([8, 4]),
    layout=st.sampled_from(["channels_last", "contiguous", "concatenated"]),
)
def test_conv2d_sums(
    batch: int,
    c: int,
    n: int,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    padding: tuple[int, int, int, int],
    kinds: tuple[str, str],
    zero_point: int,
    bits: int,
    layout: str,
) -> None:
    q = filled(kinds[0], batch, c, *size, seed=c)
    weight = filled(kinds[1], n, c, kernel, kernel, seed=n, bits=bits)
    check_conv2d(laid_out(q, layout), weight, zero_point, bits, stride, padding)


def test_conv2d_sums_of_a_large_batch() -> None:
    q = filled("random", 64, 16, 8, 8, seed=1).to(memory_format=torch.channels_last)
    check_conv2d(q, filled("random", 24, 16, 3, 3, seed=2), 5, 8, 2, (0, 1, 0, 1))
    check_conv2d(q, filled("low", 24, 16, 3, 3, seed=2), -128, 8, 1, (1, 1, 1, 1))


def laid_out(q: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return q
    q = q.to(memory_format=torch.channels_last)
    return torch.cat([q[:, :1], q[:, 1:]], dim=1) if layout == "concatenated" else q


def check_conv2d(
    q: Tensor, weight: Tensor, zero_point: int, bits: int, stride: int, padding: tuple[int, ...]
) -> None:
    top, bottom, left, right = padding
    centered = torch.nn.functional.pad(q.long() - zero_point, (left, right, top, bottom))
    expected = unfolded_conv2d(centered, weight.long(), stride)
    size, row = list(weight.shape[2:]), cases.row((1.0, float(zero_point)))
    weight = pack_int4(weight) if bits == 4 else weight
    where = (size, [stride, stride], list(padding), [1, 1], 1)
    sums = reference.accumulate_conv2d(stored(q), row, 0, weight, bits, *where)
    assert torch.equal(sums, expected)
    unit, end = torch.ones(weight.shape[0]), (None, "none", None, -1, 8, torch.float32)
    for kernel in cases.layer_kernels(bits):
        y = cases.call("conv2d", kernel, stored(q), row, 0, weight, unit, None, bits, *where, *end)
        assert torch.equal(y.long(), expected), kernel


def unfolded_conv2d(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A convolution in int64, by windows: independent of the reference."""
    height, width = weight.shape[2:]
    windows = x.unfold(2, height, stride).unfold(3, width, stride)
    return torch.einsum("bchwij,ncij->bnhw", windows, weight)
