"""Results do not depend on the number of threads, nor on who else is calling."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fxquant.kernels import jit
from fxquant.kernels.machine import detect
from tests.kernels import cases

pytestmark = pytest.mark.skipif(
    detect().arch != "x86_64" or not detect().has_vnni or jit.find_compiler() is None,
    reason="the x86 kernels need VNNI and a compiler",
)


def large(op: str) -> tuple[Any, ...]:
    """A call that is worth several threads."""
    image, row = (
        cases.floats(3, 48, 40, 33).contiguous(memory_format=torch.channels_last),
        cases.row(),
    )
    tokens, u8 = cases.floats(3, 301, 96), torch.uint8
    return {
        "quantize": (image, row, 0, 8, "gelu", u8),
        "linear": cases.linear_args(batch=(3, 301), k=96, n=160, activation="gelu"),
        "conv2d": cases.conv2d_args(batch=3, c=32, n=48, size=(40, 33), activation="silu"),
        "group_norm_silu_quantize": (
            image, row, -1, 8, None, None, 8, 1e-5, "silu", torch.float32,
        ),
        "layer_norm_quantize": (tokens, row, -1, 8, None, None, 1e-5, torch.float32),
        "geglu_quantize": (tokens, row, 0, 8, "none", u8),
        "cat_quantize": ([image, image], row, 0, 8, 1, u8),
        "upsample_quantize": (image, row, 0, 8, 2, u8),
        "add_quantize": (image, image, row, 0, 8, u8),
    }[op]  # fmt: skip


OPS = [(op, "fused") for op in cases.PRODUCERS] + [("linear", "onednn"), ("conv2d", "onednn")]


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("op", "kernel"), OPS)
def test_any_number_of_threads_gives_the_same_bits(op: str, kernel: str) -> None:
    args = large(op)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(cases.call(op, kernel, *args))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("op", "kernel"), OPS)
def test_four_callers_at_once_get_the_same_bits(op: str, kernel: str) -> None:
    args = large(op)
    alone = cases.call(op, kernel, *args)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(cases.call, op, kernel, *args) for _ in range(12)]
        assert all(torch.equal(call.result(), alone) for call in calls)


def test_a_sample_does_not_feel_its_batch() -> None:
    for op, kernel in OPS:
        args = large(op)
        if isinstance(args[0], list):
            continue
        alone = tuple(
            a[1:2] if isinstance(a, torch.Tensor) and a.dim() > 2 and a.shape[0] == 3 else a
            for a in args
        )
        assert torch.equal(cases.call(op, kernel, *args)[1:2], cases.call(op, kernel, *alone))
