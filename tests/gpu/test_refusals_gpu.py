"""Calls that kernels cannot run are refused by name, and the GPU is as usable as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import OperandError
from fxquant.kernels.cutlass import gemm
from tests.gpu.products import Case, Gemm, Window, assert_same, expected, on_gpu

LINEAR, CONV = Case(Gemm(33, 32, 48)), Case(Window(2, 32, 16, (6, 5)), channel_add=True)


def cpu(name: str) -> tuple[str, Any]:
    return name, lambda t: t.cpu()


BAD: dict[str, tuple[str, Any]] = {
    "unsigned activations": ("x", lambda t: t.to(torch.uint8)),
    "float activations": ("x", lambda t: t.half()),
    "float weights": ("weight", lambda t: t.half()),
    "row on the CPU": cpu("row"),
    "weight on the CPU": cpu("weight"),
    "scales on the CPU": cpu("weight_scale"),
    "bias on the CPU": cpu("bias"),
    "residual on the CPU": cpu("residual"),
    "a row of float64": ("row", lambda t: t.double()),
    "a row of one column": ("row", lambda t: t[:, :1].contiguous()),
    "no such quantiser": ("x_index", lambda i: 5),
    "a negative quantiser": ("x_index", lambda i: -1),
    "no such output quantiser": ("out_index", lambda i: 99),
    "floats of a quantiser": ("out_index", lambda i: 1),
    "float64 out": ("out_dtype", lambda d: torch.float64),
    "integers of no quantiser": ("out_dtype", lambda d: torch.int8),
    "a bias of another size": ("bias", lambda t: t[:5].contiguous()),
    "scales of another size": ("weight_scale", lambda t: t[:5].contiguous()),
    "a weight of other channels": ("weight", lambda t: t[:, :16].contiguous()),
}
BAD_LINEAR = {"no such activation": ("activation", lambda a: "relu")}
BAD_CONV: dict[str, tuple[str, Any]] = {
    "groups": ("groups", lambda g: 2),
    "channel_add on the CPU": cpu("channel_add"),
    "channel_add of another size": ("channel_add", lambda t: t[:, :5].contiguous()),
}


def check_refused(case: Case, what: tuple[str, Any]) -> None:
    name, change = what
    good = on_gpu(case.with_(residual=torch.float16).arguments())
    function = getattr(gemm.INT8, case.op)
    with pytest.raises((OperandError, ValueError, KeyError)) as error:
        function(**{**good, name: change(good[name])})
    assert isinstance(error.value, OperandError), f"{error.value!r} is no named error"
    torch.cuda.synchronize()
    assert_same(function(**good), expected(case.with_(residual=torch.float16)))


@pytest.mark.parametrize("bad", [*BAD, *BAD_LINEAR])
def test_a_linear_is_refused(bad: str) -> None:
    check_refused(LINEAR, {**BAD, **BAD_LINEAR}[bad])


@pytest.mark.parametrize("bad", [*BAD, *BAD_CONV])
def test_a_convolution_is_refused(bad: str) -> None:
    check_refused(CONV, {**BAD, **BAD_CONV}[bad])


def test_operands_off_their_alignment_are_copied_or_refused() -> None:
    """A view into a buffer may begin at any byte."""
    case = Case(Gemm(33, 32, 48))
    good = on_gpu(case.arguments())
    buffer = torch.empty(good["x"].numel() + 1, dtype=torch.int8, device="cuda")
    shifted: Tensor = buffer[1:].view(good["x"].shape)
    shifted.copy_(good["x"])
    try:
        result = gemm.INT8.linear(**{**good, "x": shifted})
    except OperandError:
        torch.cuda.synchronize()
        result = gemm.INT8.linear(**good)
    assert_same(result, expected(case))
