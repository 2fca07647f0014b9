"""The reference against formulas that are written another way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fxquant.kernels import reference
from fxquant.kernels.int4 import pack_int4, unpack_int4
from tests.kernels import cases


def test_quantisation_by_hand() -> None:
    row = cases.row((0.5, -3.0))
    x = torch.tensor([0.0, 0.25, 0.75, 1.25, -0.25, 1e9, -1e9, float("nan")])
    expected = [-3, -3, -1, -1, -3, 127, -128, -128]  # halves go to the even neighbour
    q = reference.quantize(x, row, 0, 8, "none", torch.int8)
    assert q.tolist() == expected
    u = reference.quantize(x, row, 0, 8, "none", torch.uint8)
    assert u.tolist() == [e + 128 for e in expected]


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_fewer_bits_clamp_earlier(bits: int) -> None:
    q = reference.quantize(torch.tensor([1e6, -1e6]), cases.row(), 0, bits, "none", torch.int8)
    assert q.tolist() == [2 ** (bits - 1) - 1, -(2 ** (bits - 1))]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_linear_is_the_linear_of_the_dequantised(dtype: torch.dtype) -> None:
    args = list(cases.linear_args(activation="gelu", residual=torch.float32))
    q = args[0].int() - 128
    args[0] = args[0] if dtype == torch.uint8 else q.to(torch.int8)
    x, weight = (q - 3) * 0.02, args[3].float() * args[4][:, None]
    expected = F.gelu(F.linear(x, weight, args[5])) + args[8]
    torch.testing.assert_close(reference.linear(*args), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_conv2d_is_the_convolution_of_the_dequantised(groups: int) -> None:
    add = cases.floats(2, 6)
    args = cases.conv2d_args(
        c=12, n=6, stride=2, padding=(0, 1, 0, 1), channel_add=add, activation="silu",
        groups=groups, residual=torch.float32,
    )  # fmt: skip
    x, weight = (args[0].float() - 131) * 0.02, args[3].float() * args[4][:, None, None, None]
    y = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, args[5], stride=2, groups=groups)
    expected = F.silu(y + add[:, :, None, None]) + args[14]
    torch.testing.assert_close(reference.conv2d(*args), expected, rtol=1e-5, atol=1e-4)


def test_requantised_linear() -> None:
    y = reference.linear(*cases.linear_args())
    q = reference.linear(*cases.linear_args(out=(1, 8, torch.int8)))
    assert torch.equal(q, reference.quantize(y, cases.row(), 1, 8, "none", torch.int8))


def test_norms() -> None:
    x, weight, bias = cases.floats(2, 12, 5, 3), cases.floats(12, seed=1), cases.floats(12, seed=2)
    y = reference.group_norm_silu_quantize(
        x, cases.row(), -1, 8, weight, bias, 4, 1e-5, "silu", torch.float32
    )
    torch.testing.assert_close(y, F.silu(F.group_norm(x, 4, weight, bias, 1e-5)))
    tokens = cases.floats(3, 5, 12)
    y = reference.layer_norm_quantize(tokens, cases.row(), -1, 8, weight, bias, 0.1, torch.float32)
    torch.testing.assert_close(y, F.layer_norm(tokens, (12,), weight, bias, 0.1))


def test_geglu_cat_upsample_add() -> None:
    row, x = cases.row(), cases.floats(2, 6, 4, 4)

    def q(y: torch.Tensor) -> torch.Tensor:
        return reference.quantize(y, row, 0, 8, "none", torch.uint8)

    rest = (row, 0, 8)
    value, gate = x[..., :2], x[..., 2:]
    geglu = reference.geglu_quantize(x, *rest, "tanh", torch.uint8)
    assert torch.equal(geglu, q(value * F.gelu(gate, approximate="tanh")))
    cat = reference.cat_quantize([x, 2 * x], *rest, 1, torch.uint8)
    assert torch.equal(cat, q(torch.cat([x, 2 * x], 1)))
    up = reference.upsample_quantize(x, *rest, 2, torch.uint8)
    assert torch.equal(up, q(F.interpolate(x, scale_factor=2.0)))
    assert torch.equal(reference.add_quantize(x, x, *rest, torch.uint8), q(2 * x))


@pytest.mark.parametrize("masked", ["no", "bool", "float"])
def test_attention(masked: str) -> None:
    q, k, v = (cases.floats(2, 3, n, 8, seed=n) for n in (5, 6, 6))
    keep = cases.floats(2, 1, 5, 6, seed=9) > -0.5
    mask = {"no": None, "bool": keep, "float": cases.floats(5, 6)}[masked]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    def attend(scale: float | None) -> torch.Tensor:
        rest = (-1, 8, torch.float32)
        return reference.attention(q, k, v, torch.ones(1, 2), -1, -1, -1, mask, scale, *rest)

    torch.testing.assert_close(attend(0.3), expected)
    torch.testing.assert_close(attend(None), attend(1 / math.sqrt(8)))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'swish' is not one of"):
        reference.quantize(cases.floats(3), cases.row(), 0, 8, "swish", torch.uint8)


@pytest.mark.parametrize("shape", [(3, 8), (3, 7), (1, 1), (2, 3, 3, 3)])
def test_int4_round_trip(shape: tuple[int, ...]) -> None:
    weight = cases.nibbles(*shape)
    packed = pack_int4(weight)
    k = weight[0].numel()
    assert packed.shape == (shape[0], (k + 1) // 2)
    assert torch.equal(unpack_int4(packed, k), weight.flatten(1))


def test_int4_keeps_the_low_nibble_first() -> None:
    assert pack_int4(torch.tensor([[1, -8, 7]], dtype=torch.int8)).tolist() == [[0x81, 0x07]]


def test_int4_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="int8"):
        pack_int4(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\[N, 3\]"):
        unpack_int4(torch.zeros(2, 2, dtype=torch.uint8), 5)
