"""The operators as torch sees them: schemas, shapes, memory order, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.kernels import ops
from fxquant.kernels.config import Config, Kernel
from fxquant.kernels.dispatch import KERNELS, TensorInfo
from fxquant.kernels.machine import detect
from tests.kernels import cases


def here(kernel: Kernel) -> bool:
    """Whether this machine can run the kernel at all (not: whether it likes the arguments)."""
    machine = detect()
    if kernel.backend == "cuda":  # test_cutlass_face and test_cuda_producers play a GPU for these
        return False
    if kernel.backend != "x86":
        return True
    ours = not kernel.name.startswith("onednn")
    return machine.arch == "x86_64" and (machine.compiler is not None if ours else machine.has_vnni)


RUNNABLE = [(k.op, k.name) for kernels in KERNELS.values() for k in kernels if here(k)]
EAGER = [(op, k) for op, k in RUNNABLE if not k.endswith("_int4")]


def test_every_schema_has_a_kernel_and_a_shape() -> None:
    assert set(ops.SCHEMAS) == set(KERNELS)
    for op in ops.SCHEMAS:
        assert hasattr(torch.ops.fxquant, op)


@pytest.mark.parametrize(("op", "kernel"), EAGER)
def test_opcheck(op: str, kernel: str) -> None:
    for args in cases.examples(op):
        torch.library.opcheck(getattr(torch.ops.fxquant, op).default, (*args, kernel))


def test_opcheck_of_four_bit_weights() -> None:
    for op, args in (
        ("linear", cases.linear_args(bits=4)),
        ("conv2d", cases.conv2d_args(bits=4)),
    ):
        for name in ("reference", "onednn_int4"):
            if (op, name) in RUNNABLE:
                torch.library.opcheck(getattr(torch.ops.fxquant, op).default, (*args, name))


@pytest.mark.parametrize(("op", "kernel"), EAGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fake_result_is_like_the_real_one(op: str, kernel: str, dtype: torch.dtype) -> None:
    function = getattr(torch.ops.fxquant, op)
    for args in cases.examples(op, dtype):
        real = function(*args, kernel)
        mode = FakeTensorMode()
        fake = function(*(faked(mode, a) for a in args), kernel)
        assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())


def faked(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, list) and isinstance(value[0], Tensor):
        return [mode.from_tensor(v) for v in value]
    return value


def test_memory_order() -> None:
    """Images come out channels last, [B, C, L] with the channels innermost, tokens contiguous."""
    norm = torch.ops.fxquant.group_norm_silu_quantize
    rest = (cases.row(), 0, 8, None, None, 4, 1e-5, "silu", torch.uint8, "reference")
    assert norm(cases.floats(2, 12, 5, 3), *rest).stride() == (180, 1, 36, 12)
    assert norm(cases.floats(2, 12, 7), *rest).stride() == (84, 1, 12)
    quantize = torch.ops.fxquant.quantize
    rest = (cases.row(), 0, 8, "none", torch.uint8, "reference")
    assert quantize(cases.floats(2, 12, 5, 3), *rest).stride() == (180, 1, 36, 12)
    assert quantize(cases.floats(2, 7, 12), *rest).stride() == (84, 12, 1)


@pytest.mark.parametrize("kernel", ["onednn", "reference"])
def test_compiled_once_for_every_batch_and_size(kernel: str) -> None:
    if ("conv2d", kernel) not in RUNNABLE:
        pytest.skip(f"this machine has no {kernel}")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    weight, other = cases.integers(8, 8, 3, 3), cases.integers(6, 8, seed=1)
    for batch, height, width in ((5, 12, 7), (4, 9, 10), (64, 5, 5)):  # equal sizes would be tied
        x = cases.floats(batch, 8, height, width)
        expected = block(x, cases.row(), weight, other, kernel)
        assert torch.equal(compiled(x, cases.row(), weight, other, kernel), expected)
    assert counter.frame_count == 1


def test_compiled_by_inductor() -> None:
    args = (cases.floats(2, 8, 6, 5), cases.row(), cases.integers(8, 8, 3, 3))
    other = cases.integers(6, 8, seed=1)
    compiled = torch.compile(block, fullgraph=True)
    assert torch.equal(compiled(*args, other, "reference"), block(*args, other, "reference"))


def block(x: Tensor, row: Tensor, weight: Tensor, other: Tensor, kernel: str) -> Tensor:
    """Quantise, convolve with a downsample's padding, hand the result on as tokens."""
    op, scale = torch.ops.fxquant, torch.full((8,), 0.01)
    q = op.quantize(x, row, 0, 8, "none", torch.uint8, "reference")
    q = op.conv2d(
        q, row, 0, weight, scale, None, 8, [3, 3], [2, 2], [0, 1, 0, 1], [1, 1], 1, None, "silu",
        None, 1, 8, torch.uint8, kernel,
    )  # fmt: skip
    tokens = q.flatten(2).transpose(1, 2)
    return op.linear(
        tokens, row, 1, other, scale[:6], None, 8, "none", None, -1, 8, torch.float32, kernel
    )


def test_export_keeps_the_operators() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", cases.integers(8, 8, 3, 3))
            self.register_buffer("other", cases.integers(6, 8, seed=1))

        def forward(self, x: Tensor, row: Tensor) -> Tensor:
            return block(x, row, self.weight, self.other, "reference")

    x = cases.floats(2, 8, 6, 5)
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {})
    exported = torch.export.export(Block(), (x, cases.row()), dynamic_shapes=dynamic)
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"fxquant.quantize.default", "fxquant.conv2d.default", "fxquant.linear.default"} <= names
    larger = cases.floats(5, 8, 6, 5, seed=1)
    assert torch.equal(exported.module()(larger, cases.row()), Block()(larger, cases.row()))


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(
        ValueError, match="quantize has no kernel 'fusd'; there are fused, cuda, ref"
    ):
        torch.ops.fxquant.quantize(*cases.examples("quantize")[0], "fusd")


def test_config_describes_an_example() -> None:
    """The names in a Config are the schema's, so that every kernel can ask for them."""
    for op, schema in ops.SCHEMAS.items():
        parsed = torch._C.parse_schema(f"{op}{schema}")
        assert parsed.arguments[-1].name == "kernel"
    config = Config("quantize", {"x": TensorInfo(torch.float32, (None, 3))}, {}, detect())
    assert config.device == "cpu"
