"""What follows the sums: the epilogues of the x86 kernels against the reference's."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels import cases

pytestmark = pytest.mark.skipif(
    not cases.layer_kernels(), reason="only the reference runs on this machine"
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
# Only oneDNN writes float16.
KERNELS = [
    (kernel, out)
    for kernel, out in itertools.product(cases.layer_kernels(), OUTPUTS)
    if kernel == "onednn" or out != "f16"
]
each_kernel = pytest.mark.parametrize("kernel", cases.layer_kernels())


@pytest.mark.parametrize(("kernel", "out"), KERNELS)
@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_linear(activation: str, residual: torch.dtype | None, kernel: str, out: str) -> None:
    args = cases.linear_args(activation=activation, residual=residual, out=OUTPUTS[out], n=50)
    expected = cases.call("linear", "reference", *args)
    relative = 1e-3 if out == "f16" else 1e-5
    actual = cases.call("linear", kernel, *args)
    cases.assert_near(actual, expected, relative)
    assert actual.is_contiguous()


@pytest.mark.parametrize(("kernel", "out"), KERNELS)
@pytest.mark.parametrize("channel_add", ["none", "equal_rows", "own_rows"])
@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_conv2d(
    activation: str, residual: torch.dtype | None, channel_add: str, kernel: str, out: str
) -> None:
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
    actual = cases.call("conv2d", kernel, *args)
    cases.assert_near(actual, expected, relative)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@each_kernel
def test_a_single_sample_takes_its_channel_add(kernel: str) -> None:
    add = cases.floats(1, 7, seed=6, dtype=torch.bfloat16)
    args = cases.conv2d_args(batch=1, channel_add=add, activation="silu")
    expected = cases.call("conv2d", "reference", *args)
    cases.assert_near(cases.call("conv2d", kernel, *args), expected)
    without = cases.conv2d_args(batch=1, activation="silu")
    assert not torch.allclose(cases.call("conv2d", "reference", *without), expected)


@each_kernel
def test_no_bias(kernel: str) -> None:
    for op, args in (("linear", cases.linear_args()), ("conv2d", cases.conv2d_args())):
        bare = (*args[:5], None, *args[6:])
        expected = cases.call(op, "reference", *bare)
        cases.assert_near(cases.call(op, kernel, *bare), expected)
        assert not torch.allclose(expected, cases.call(op, "reference", *args))


@each_kernel
def test_the_residual_is_left_as_it_was(kernel: str) -> None:
    for op, args in (
        ("linear", cases.linear_args(residual=torch.float32)),
        ("conv2d", cases.conv2d_args(residual=torch.float32)),
    ):
        residual = next(a for a in reversed(args) if isinstance(a, torch.Tensor))
        before = residual.clone()
        cases.call(op, kernel, *args)
        assert torch.equal(residual, before)


@pytest.mark.parametrize("kernel", cases.layer_kernels(4))
def test_four_bit_weights_meet_their_reference(kernel: str) -> None:
    for op, args in (
        ("linear", cases.linear_args(bits=4, k=23, activation="gelu")),
        ("conv2d", cases.conv2d_args(bits=4, activation="silu")),
    ):
        expected = cases.call(op, "reference", *args)
        cases.assert_near(cases.call(op, kernel, *args), expected)
