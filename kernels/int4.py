"""Four-bit weights: two per byte, low nibble first, two's complement."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(weight: Tensor) -> Tensor:
    """Pack integers in [-8, 7], int8 ``[N, ...]``, into uint8 ``[N, ceil(K / 2)]``.

    ``K`` is the number of weights of one output channel. An odd ``K`` leaves a zero nibble last.
    """
    if weight.dtype != torch.int8:
        raise ValueError(f"pack_int4 takes int8 weights, not {weight.dtype}")
    nibbles = weight.flatten(1).view(torch.uint8) & 0xF
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Undo `pack_int4`: uint8 ``[N, ceil(k / 2)]`` -> int8 ``[N, k]``."""
    if packed.dtype != torch.uint8 or packed.shape[1] != (k + 1) // 2:
        raise ValueError(
            f"{k} four-bit weights per channel take uint8 [N, {(k + 1) // 2}], "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :k]
    return (nibbles.view(torch.int8) ^ 8) - 8  # sign-extends the nibble


def unpacked(weight: Tensor, weight_bits: int, shape: tuple[int, ...]) -> Tensor:
    """The int8 weight of natural ``shape`` ``[N, ...]``, whichever way it is stored."""
    if weight_bits > 4:
        return weight
    k = 1
    for size in shape[1:]:
        k *= size
    return unpack_int4(weight, k).reshape(shape)
