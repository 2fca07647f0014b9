"""What the CUDA producers promise, for any device: run on a GPU, and on a CPU that plays one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.kernels.cuda import weights
from fxquant.kernels.int4 import pack_int4
from tests.kernels import cases

bounded = settings(max_examples=150, deadline=None, derandomize=True, database=None)
norms_bounded = settings(bounded, max_examples=60)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
values = st.sampled_from(["ordinary", "large", "zero", "negative"])
layouts = st.sampled_from(["channels_last", "contiguous", "strided", "shifted"])
bits_ = st.sampled_from([4, 8])
ends = st.sampled_from([(0, torch.int8), (1, torch.int8), (-1, torch.float32),
                        (-1, torch.float16), (-1, torch.bfloat16)])  # fmt: skip
Device = str


def filled(kind: str, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = cases.floats(*shape, seed=seed)
    x = {"ordinary": 2 * x, "large": 1e4 * x, "zero": 0 * x, "negative": -3 - x.abs()}[kind]
    return x.to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory order; shifted ones start off every alignment."""
    if layout == "contiguous" or x.dim() < 2:
        return x
    if layout == "strided":
        return torch.stack((x, x), dim=-1)[..., 0]
    ordered = (x.movedim(1, -1) if x.dim() > 3 or layout == "channels_last" else x).contiguous()
    if layout == "shifted":
        flat = ordered.new_empty(ordered.numel() + 1)[1:]
        ordered = flat.view(ordered.shape).copy_(ordered)
    return ordered.movedim(-1, 1) if x.dim() > 3 or layout == "channels_last" else ordered


def moved(argument: object, device: Device) -> object:
    """The argument on the device, in the same strides."""
    if isinstance(argument, list):
        return [moved(x, device) for x in argument]
    if not isinstance(argument, Tensor) or device == "cpu":
        return argument
    offset = argument.storage_offset()
    storage = torch.empty(argument.untyped_storage().nbytes() // argument.element_size(),
                          dtype=argument.dtype, device=device)  # fmt: skip
    return storage.as_strided(argument.shape, argument.stride(), offset).copy_(argument)


def check(device: Device, op: str, *args: object, exact: bool = False) -> Tensor:
    """The kernel's result, found to be the reference's in values and memory order."""
    expected = cases.call(op, "reference", *args)
    actual = cases.call(op, "cuda", *(moved(argument, device) for argument in args))
    assert actual.stride() == expected.stride()
    actual = actual.cpu()
    if exact:
        assert torch.equal(actual, expected)
    else:
        near = 2.0**-10 if expected.dtype == torch.float16 else 1e-5
        cases.assert_near(actual, expected, near)
    return actual


@bounded
@given(
    shape=st.sampled_from(
        [(1,), (7, 3), (2, 5, 33), (64, 128), (3, 17, 5, 7), (2, 24, 9, 3), (2, 3, 4, 5, 6)]
    ),
    activation=st.sampled_from(["none", "silu", "gelu", "gelu_tanh"]),
    bits=bits_,
    dtype=dtypes,
    kind=values,
    layout=layouts,
)
def quantize(
    device: Device,
    shape: tuple[int, ...],
    activation: str,
    bits: int,
    dtype: torch.dtype,
    kind: str,
    layout: str,
) -> None:
    x = laid_out(filled(kind, *shape, dtype=dtype), layout)
    exact = activation == "none"
    check(device, "quantize", x, cases.row(), 1, bits, activation, torch.int8, exact=exact)


@bounded
@given(
    scale=st.floats(2.0**-100, 2.0**100, width=32),
    zero_point=st.integers(-128, 127),
    seed=st.integers(0, 1000),
    bits=bits_,
)
def rounding(device: Device, scale: float, zero_point: int, seed: int, bits: int) -> None:
    """Every tie of the range and its neighbours, a few ulp to either side."""
    ties = (torch.arange(-300, 301).double() / 2 * scale).float()
    around = torch.stack([ties.view(torch.int32) + ulp for ulp in range(-4, 5)])
    x = torch.cat(
        (around.view(torch.float32).flatten(), 100 * scale * cases.floats(640, seed=seed))
    )
    row = cases.row((scale, float(zero_point)))
    check(device, "quantize", x, row, 0, bits, "none", torch.int8, exact=True)


@norms_bounded
@given(
    batch=st.sampled_from([1, 3]),
    channels=st.sampled_from(
        [(4, 2), (6, 3), (17, 1), (40, 8), (320, 32), (960, 32), (600, 1), (258, 2), (2600, 2)]
    ),
    spatial=st.sampled_from([(1,), (7,), (5, 3), (9, 8), (2, 3, 4), (16, 15)]),
    dtype=dtypes,
    kind=values,
    layout=layouts,
    activation=st.sampled_from(["none", "silu"]),
    end=ends,
    affine=st.sampled_from([None, torch.float32, torch.float16, "mixed"]),
)
def group_norm(
    device: Device,
    batch: int,
    channels: tuple[int, int],
    spatial: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    layout: str,
    activation: str,
    end: tuple[int, torch.dtype],
    affine: torch.dtype | str | None,
) -> None:
    c, groups = channels
    x = laid_out(filled(kind, batch, c, *spatial, dtype=dtype), layout)
    # A group of equal values divides noise by sqrt(eps): a large eps keeps it small.
    eps = 1e-5 if kind == "ordinary" else 1e-2
    check(
        device, "group_norm_silu_quantize", x, cases.row(), end[0], 8, *_affine(c, affine), groups,
        eps, activation, end[1],
    )  # fmt: skip


@norms_bounded
@given(
    rows=st.sampled_from([(1,), (3,), (9, 2), (2, 3, 5)]),
    width=st.sampled_from([1, 5, 16, 40, 319, 320, 768, 1280, 8192, 8191, 9001]),
    dtype=dtypes,
    kind=values,
    layout=st.sampled_from(["contiguous", "strided", "shifted"]),
    end=ends,
    affine=st.sampled_from([None, torch.float32, torch.float16, "mixed"]),
)
def layer_norm(
    device: Device,
    rows: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    kind: str,
    layout: str,
    end: tuple[int, torch.dtype],
    affine: torch.dtype | str | None,
) -> None:
    x = laid_out(filled(kind, *rows, width, dtype=dtype), layout)
    eps = 1e-5 if kind == "ordinary" else 1e-2
    check(
        device, "layer_norm_quantize", x, cases.row(), end[0], 8, *_affine(width, affine), eps,
        end[1],
    )  # fmt: skip


def means_far_from_zero(device: Device) -> None:
    """Measured against float64, with the first value far off: it is no good pivot."""
    for mean in (0.0, 1000.0, -30000.0, 1e6):
        x = mean + cases.floats(2, 64, 40, 30)
        x[0, 0, 0, 0] += 100
        end = (cases.row().to(device), -1, 8, None, None)
        args = (x.to(device), *end, 8, 1e-5, "none", x.dtype)
        y = cases.call("group_norm_silu_quantize", "cuda", *args).cpu()
        exact = torch.nn.functional.group_norm(x.double(), 8, eps=1e-5)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-6)
        tokens = x.reshape(-1, 1200)
        y = cases.call("layer_norm_quantize", "cuda", tokens.to(device), *end, 1e-5, x.dtype).cpu()
        exact = torch.nn.functional.layer_norm(tokens.double(), (1200,), eps=1e-5)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-6)


@bounded
@given(
    rows=st.sampled_from([(1,), (3,), (64, 2), (2, 3, 5)]),
    width=st.sampled_from([1, 5, 16, 37, 1280]),
    approximate=st.sampled_from(["none", "tanh"]),
    bits=bits_,
    dtype=dtypes,
    kind=values,
    layout=st.sampled_from(["contiguous", "strided", "shifted"]),
)
def geglu(
    device: Device,
    rows: tuple[int, ...],
    width: int,
    approximate: str,
    bits: int,
    dtype: torch.dtype,
    kind: str,
    layout: str,
) -> None:
    x = laid_out(filled(kind, *rows, 2 * width, dtype=dtype), layout)
    check(device, "geglu_quantize", x, cases.row(), 0, bits, approximate, torch.int8)


@bounded
@given(
    widths=st.lists(st.sampled_from([1, 3, 8, 16, 40]), min_size=1, max_size=4),
    dim=st.sampled_from([0, 1, 2, 3, -1]),
    kinds=st.lists(st.tuples(dtypes, values, layouts), min_size=4, max_size=4),
    is_image=st.booleans(),
)
def cat(
    device: Device,
    widths: list[int],
    dim: int,
    kinds: list[tuple[torch.dtype, str, str]],
    is_image: bool,
) -> None:
    parts = []
    for seed, (width, (dtype, kind, layout)) in enumerate(zip(widths, kinds, strict=False)):
        shape = [2, 3, 4, 5] if is_image else [2, 7, 5]
        shape[dim % len(shape)] = width
        parts.append(laid_out(filled(kind, *shape, dtype=dtype, seed=seed), layout))
    dim = dim % parts[0].dim() - (parts[0].dim() if dim < 0 else 0)
    check(device, "cat_quantize", parts, cases.row(), 0, 8, dim, torch.int8, exact=True)


@bounded
@given(
    shape=st.tuples(
        st.integers(1, 3), st.sampled_from([1, 4, 5, 8, 40]), st.integers(1, 6), st.integers(1, 6)
    ),
    factor=st.integers(1, 3),
    dtype=dtypes,
    kind=values,
    layout=layouts,
)
def upsample(
    device: Device,
    shape: tuple[int, ...],
    factor: int,
    dtype: torch.dtype,
    kind: str,
    layout: str,
) -> None:
    x = laid_out(filled(kind, *shape, dtype=dtype), layout)
    check(device, "upsample_quantize", x, cases.row(), 0, 8, factor, torch.int8, exact=True)


@bounded
@given(
    shape=st.sampled_from([(1,), (3, 7), (2, 3, 5), (1, 17, 5, 3), (3, 8, 3, 3), (700, 16)]),
    kinds=st.tuples(values, values),
    dtypes_=st.tuples(dtypes, dtypes),
    layouts_=st.tuples(layouts, layouts),
    bits=bits_,
)
def add(
    device: Device,
    shape: tuple[int, ...],
    kinds: tuple[str, str],
    dtypes_: tuple[torch.dtype, torch.dtype],
    layouts_: tuple[str, str],
    bits: int,
) -> None:
    a = laid_out(filled(kinds[0], *shape, dtype=dtypes_[0]), layouts_[0])
    b = laid_out(filled(kinds[1], *shape, dtype=dtypes_[1], seed=1), layouts_[1])
    check(device, "add_quantize", a, b, cases.row(), 2, bits, torch.int8, exact=True)


def what_is_not_finite(device: Device) -> None:
    odd = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -0.0, 1.0])
    # torch's vectorised erf makes gelu(inf) a NaN, its scalar one infinity.
    bounded_above = {"posinf": 1e4, "neginf": -math.inf, "nan": math.nan}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = odd.repeat(8, 3).to(dtype)
        tail = (cases.row((0.02, 3.0)), 0, 8)
        for activation in ("none", "silu", "gelu_tanh"):
            check(device, "quantize", x, *tail, activation, torch.int8)
        check(device, "quantize", x.nan_to_num(**bounded_above), *tail, "gelu", torch.int8)
        check(device, "geglu_quantize", x.nan_to_num(**bounded_above), *tail, "none", torch.int8)
        check(device, "add_quantize", x, x.flip(-1).contiguous(), *tail, torch.int8, exact=True)
        check(device, "geglu_quantize", x, *tail, "tanh", torch.int8)
        image = cases.floats(2, 16, 3, 5).to(dtype)
        for value in odd[:3]:
            image[0, 3, 1, 1] = value
            check(device, "group_norm_silu_quantize", image, *tail, None, None, 4, 1e-5, "silu",
                  torch.int8)  # fmt: skip
            check(device, "layer_norm_quantize", image, *tail, None, None, 1e-5, torch.int8)


def nothing_at_all(device: Device) -> None:
    tail = (cases.row(), 0, 8)
    image = torch.empty(0, 8, 4, 4)
    for op, extra in (("quantize", ("none",)), ("upsample_quantize", (2,)),
                      ("group_norm_silu_quantize", (None, None, 2, 1e-5, "none")),
                      ("layer_norm_quantize", (None, None, 1e-5)),
                      ("geglu_quantize", ("none",))):  # fmt: skip
        args = (moved(x, device) for x in (image, *tail, *extra, torch.int8))
        assert cases.call(op, "cuda", *args).numel() == 0


@bounded
@given(
    n=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 3, 4, 15, 16, 37, 256, 320, 600]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 5), (7, 7), (1, 40), (60, 60)]),
    multiple=st.sampled_from([1, 4, 8, 16]),
    pad=st.sampled_from([0, 0, 33]),
)
def unpack_conv(
    device: Device, n: int, channels: int, kernel: tuple[int, int], multiple: int, pad: int
) -> None:
    channels = min(channels, 40) if kernel == (60, 60) else channels
    natural = cases.nibbles(n, channels, *kernel)
    columns = math.ceil(channels / multiple) * multiple + pad
    made = weights.unpack_conv(pack_int4(natural).to(device), channels, kernel, columns).cpu()
    assert made.shape == (n, *kernel, columns)
    assert torch.equal(made[..., :channels], natural.permute(0, 2, 3, 1))
    assert not made[..., channels:].any()


@bounded
@given(
    rows=st.sampled_from([(), (1,), (7,), (2, 5)]),
    k=st.sampled_from([1, 2, 15, 16, 31, 64, 320]),
    pad=st.sampled_from([0, 1, 16, 33]),
)
def pack_activations(device: Device, rows: tuple[int, ...], k: int, pad: int) -> None:
    x = cases.nibbles(*rows, k)
    columns = math.ceil(k / 16) * 16 if pad == 16 else (k + pad + 1) // 2 * 2
    made = weights.pack_int4(x.to(device), columns).cpu()
    assert made.shape == (*rows, columns // 2)
    padded = torch.nn.functional.pad(x, (0, columns - k)).reshape(-1, columns)
    assert torch.equal(made.view(-1, columns // 2), pack_int4(padded))


def _affine(size: int, affine: torch.dtype | str | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, of one dtype or two, or neither."""
    if affine is None:
        return None, None
    dtypes = (torch.bfloat16, torch.float32) if affine == "mixed" else (affine, affine)
    weight, bias = cases.floats(size, seed=1), cases.floats(size, seed=2)
    return weight.to(dtypes[0]), bias.to(dtypes[1])  # type: ignore[arg-type]


PRODUCERS: tuple[Callable[[Device], None], ...] = (
    quantize, rounding, group_norm, layer_norm, means_far_from_zero, geglu, cat, upsample, add,
    what_is_not_finite, nothing_at_all,
)  # fmt: skip
WEIGHTS: tuple[Callable[[Device], None], ...] = (unpack_conv, pack_activations)
