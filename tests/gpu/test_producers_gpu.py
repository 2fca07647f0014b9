"""The CUDA producers and weight kernels on a real GPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxquant.kernels.cuda import launch, weights
from fxquant.kernels.int4 import pack_int4
from fxquant.kernels.machine import detect
from tests.kernels import cases, producer_properties

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not {"producers", "weights"} <= detect("cuda").cuda_kernels,
    reason="needs a GPU, and the libraries that `fxquant kernels build` makes",
)


@pytest.mark.parametrize(
    "holds", producer_properties.PRODUCERS + producer_properties.WEIGHTS, ids=lambda f: f.__name__
)
def test_property(holds: Callable[[str], None]) -> None:
    holds("cuda:0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_of_a_real_unet(dtype: torch.dtype) -> None:
    end = (cases.row(), 0, 8)
    for channels, size in ((320, 64), (640, 32), (1280, 16), (2560, 8), (960, 64)):
        image = cases.floats(2, channels, size, size).to(dtype)
        affine = cases.floats(channels, seed=1), cases.floats(channels, seed=2)
        norm = (*end, *affine, 32, 1e-5, "silu", torch.int8)
        producer_properties.check("cuda:0", "group_norm_silu_quantize", image, *norm)
        tokens = image.flatten(2).transpose(1, 2).contiguous()
        norm = (*end, *affine, 1e-5, torch.int8)
        producer_properties.check("cuda:0", "layer_norm_quantize", tokens, *norm)
        producer_properties.check("cuda:0", "geglu_quantize", tokens, *end, "none", torch.int8)
        both = [image, image.flip(0)]
        producer_properties.check("cuda:0", "cat_quantize", both, *end, 1, torch.int8, exact=True)
        producer_properties.check("cuda:0", "upsample_quantize", image, *end, 2, torch.int8,
                                  exact=True)  # fmt: skip


def test_results_repeat() -> None:
    x = cases.floats(2, 320, 64, 64).to("cuda", torch.float16)
    args = (x, cases.row().cuda(), -1, 8, None, None, 32, 1e-5, "silu", torch.float32)
    first = cases.call("group_norm_silu_quantize", "cuda", *args)
    for _ in range(10):
        assert torch.equal(cases.call("group_norm_silu_quantize", "cuda", *args), first)


def test_the_callers_stream_is_used_and_can_be_captured() -> None:
    x, row = cases.floats(2, 64, 8, 8).cuda(), cases.row().cuda()
    args = (0, 8, None, None, 8, 1e-5, "silu", torch.int8)
    cases.call("group_norm_silu_quantize", "cuda", x, row, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cases.call("group_norm_silu_quantize", "cuda", x, row, *args)
    x.copy_(cases.floats(2, 64, 8, 8, seed=1))
    row.mul_(0.5)
    graph.replay()
    expected = cases.call("group_norm_silu_quantize", "reference", x.cpu(), row.cpu(), *args)
    cases.assert_near(y.cpu(), expected)


def test_tensors_of_two_devices_are_refused() -> None:
    x = cases.floats(2, 8).cuda()
    with pytest.raises(ValueError, match="row is on cpu"):
        cases.call("quantize", "cuda", x, cases.row(), 0, 8, "none", torch.int8)
    assert launch.stream(x.device) == torch.cuda.current_stream().cuda_stream


def test_large_weights() -> None:
    natural = cases.nibbles(640, 1280, 3, 3)
    made = weights.unpack_conv(pack_int4(natural).cuda(), 1280, (3, 3), 1280)
    assert torch.equal(made.cpu(), natural.permute(0, 2, 3, 1))
