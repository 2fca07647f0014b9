"""oneDNN's convolution is right, zero points included, for windows of any shape."""

from __future__ import annotations

import pytest
import torch

import fxquant.kernels.ops  # noqa: F401 - registers torch.ops.fxquant
from fxquant.kernels.machine import detect

# (batch, channels, outputs, height, width), kernel, padding, dilation, stride: each was wrong, by
# 30 % to millions of times, or read foreign memory, on a CPU with AMX when oneDNN padded itself.
CASES = [
    ((2, 16, 32, 4, 64), (3, 1), (1, 1, 0, 0), (1, 1), (1, 1)),
    ((1, 16, 3, 16, 1), (3, 2), (1, 1, 1, 1), (1, 2), (1, 1)),
    ((1, 32, 32, 8, 130), (7, 2), (1, 1, 0, 0), (1, 1), (1, 1)),
    ((2, 100, 8, 2, 64), (2, 2), (1, 1, 1, 1), (3, 3), (1, 1)),
    ((2, 64, 32, 33, 1), (3, 3), (1, 1, 1, 1), (1, 1), (2, 2)),
    ((1, 8, 3, 33, 4), (1, 3), (0, 0, 0, 0), (1, 1), (1, 2)),
    ((1, 8, 64, 16, 4), (2, 2), (0, 0, 0, 0), (1, 1), (3, 3)),
    ((2, 16, 16, 1, 20), (1, 3), (0, 0, 1, 1), (1, 1), (1, 1)),
]


@pytest.mark.skipif(not detect("cpu").has_vnni, reason="oneDNN's kernels need VNNI")
@pytest.mark.parametrize(("sizes", "kernel", "padding", "dilation", "stride"), CASES)
def test_it_equals_the_reference(sizes, kernel, padding, dilation, stride) -> None:
    batch, channels, outputs, height, width = sizes
    x = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (outputs, channels, *kernel), dtype=torch.int8)
    row, scale, bias = torch.tensor([[0.02, 117.0]]), torch.rand(outputs), torch.randn(outputs)
    results = [
        torch.ops.fxquant.conv2d(
            x, row, 0, weight, scale, bias, 8, kernel, stride, padding, dilation, 1, None, "none",
            None, -1, 8, torch.float32, name,
        )
        for name in ("onednn", "reference")
    ]  # fmt: skip
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)
