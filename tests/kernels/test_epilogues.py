"""What follows the sums: oneDNN's epilogues against the reference's."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxquant.kernels.machine import detect
from tests.kernels import cases

pytestmark = pytest.mark.skipif(
    detect().arch != "x86_64" or not detect().has_vnni, reason="the x86 kernels need VNNI"
)
OUTPUTS = {
    "f32": (-1, 8, torch.float32),
    "bf16": (-1, 8, torch.bfloat16),
    "f16": (-1, 8, torch.float16),
    "u8": (1, 8, torch.uint8),
    "i8": (1, 8, torch.int8),
    "u4": (1, 4, torch.uint8),
}
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh")
EPILOGUES = list(itertools.product(ACTIVATIONS, (None, torch.float32, torch.bfloat16)))


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_linear(activation: str, residual: torch.dtype | None, out: str) -> None:
    args = cases.linear_args(activation=activation, residual=residual, out=OUTPUTS[out], n=50)
    expected = cases.call("linear", "reference", *args)
    relative = 1e-3 if out == "f16" else 1e-5
    actual = cases.call("linear", "onednn", *args)
    cases.assert_near(actual, expected, relative)
    assert actual.is_contiguous()


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("channel_add", ["none", "equal_rows", "own_rows"])
@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_conv2d(activation: str, residual: torch.dtype | None, channel_add: str, out: str) -> None:
    adds = {
        "none": None,
        "equal_rows": cases.floats(1, 19, seed=6).expand(2, 19).contiguous(),
        "own_rows": cases.floats(2, 19, seed=6),
    }
    args = cases.conv2d_args(
        n=19, activation=activation, residual=residual, channel_add=adds[channel_add],
        out=OUTPUTS[out],
    )  # fmt: skip
    expected = cases.call("conv2d", "reference", *args)
    relative = 1e-3 if out == "f16" else 1e-5
    actual = cases.call("conv2d", "onednn", *args)
    cases.assert_near(actual, expected, relative)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_a_single_sample_takes_its_channel_add() -> None:
    add = cases.floats(1, 7, seed=6, dtype=torch.bfloat16)
    args = cases.conv2d_args(batch=1, channel_add=add, activation="silu")
    expected = cases.call("conv2d", "reference", *args)
    cases.assert_near(cases.call("conv2d", "onednn", *args), expected)
    without = cases.conv2d_args(batch=1, activation="silu")
    assert not torch.allclose(cases.call("conv2d", "reference", *without), expected)


def test_no_bias() -> None:
    for op, args in (("linear", cases.linear_args()), ("conv2d", cases.conv2d_args())):
        bare = (*args[:5], None, *args[6:])
        expected = cases.call(op, "reference", *bare)
        cases.assert_near(cases.call(op, "onednn", *bare), expected)
        assert not torch.allclose(expected, cases.call(op, "reference", *args))


def test_the_residual_is_left_as_it_was() -> None:
    for op, args in (
        ("linear", cases.linear_args(residual=torch.float32)),
        ("conv2d", cases.conv2d_args(residual=torch.float32)),
    ):
        residual = next(a for a in reversed(args) if isinstance(a, torch.Tensor))
        before = residual.clone()
        cases.call(op, "onednn", *args)
        assert torch.equal(residual, before)


def test_four_bit_weights_meet_their_reference() -> None:
    for op, args in (
        ("linear", cases.linear_args(bits=4, k=23, activation="gelu")),
        ("conv2d", cases.conv2d_args(bits=4, activation="silu")),
    ):
        expected = cases.call(op, "reference", *args)
        cases.assert_near(cases.call(op, "onednn_int4", *args), expected)
