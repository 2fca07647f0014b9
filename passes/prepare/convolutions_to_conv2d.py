"""Bring convolutions of one and three dimensions, and named paddings, to conv2d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.graph import nodes
from fxquant.graph.nodes import CONSTANT_PAD, CONV2D, argument, aten, call, calls, shape
from fxquant.graph.options import Options

_DIMENSIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
_TIME = 2  # axis of [B, C, T, H, W]


def convolutions_to_conv2d(gm: GraphModule, *, options: Options) -> GraphModule:
    """One convolution has integer kernels; the others are it, seen through a reshape.

    One of one dimension gets a height of 1. Of three: a kernel over time alone takes height and
    width as one axis, any other one takes frames as samples and its taps in time as channels.

        %conv1d: f32[Bx32x20] = conv1d(%x, conv.weight, conv.bias, [1], [1])
    becomes
        %unsqueeze: f32[Bx16x1x20] = unsqueeze(%x, 2)
        %unsqueeze_1: f32[32x16x1x3] = unsqueeze(conv.weight, 2)
        %conv2d: f32[Bx32x1x20] = conv2d(%unsqueeze, %unsqueeze_1, conv.bias, [1, 1], [0, 1], ...)
        %squeeze: f32[Bx32x20] = squeeze(%conv2d, 2)
    and
        %conv2d: f32[Bx32x8hx8w] = conv2d(%x, conv.weight, conv.bias, [1, 1], 'same')
    becomes
        %conv2d_1: f32[Bx32x8hx8w] = conv2d(%x, conv.weight, conv.bias, [1, 1], [1, 1], ...)

    What has no batch, and grouped convolutions of three dimensions, stay.
    """
    rewrites = {1: _from_1d, 2: _conv2d, 3: _from_3d}
    for node in calls(gm, *_DIMENSIONS):
        dimensions = _DIMENSIONS[node.target]
        conv = _read(node, dimensions)
        if len(shape(conv.x)) == dimensions + 2 and (dimensions < 3 or conv.groups == 1):
            with gm.graph.inserting_before(node):
                new = rewrites[dimensions](_Builder(gm, node), conv)
            nodes.replace(node, new)
    return gm


@dataclass(frozen=True)
class _Conv:
    """A convolution's arguments, those by dimension from the outermost in.

    Attributes:
        padding: (before, after) of each dimension.
    """

    x: Node
    weight: Node
    bias: Node | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


class _Builder:
    """Inserts ATen calls with the notes of the convolution that they replace."""

    def __init__(self, gm: GraphModule, like: Node):
        self._gm, self._like = gm, like

    def __call__(self, target: Callable[..., Any], *args: Any) -> Node:
        return call(self._gm, target, args, like=self._like)

    def size(self, x: Node, axis: int) -> Any:
        """A number, or the node that asks for it."""
        size = shape(x)[axis]
        return size if isinstance(size, int) else self(aten.sym_size.int, x, axis)


def _read(node: Node, dimensions: int) -> _Conv:
    stride, dilation = (
        _each(argument(node, place, name, 1), dimensions)
        for place, name in ((3, "stride"), (5, "dilation"))
    )
    x, weight = node.args[:2]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    by_name = str(node.target).endswith(".padding")
    given = argument(node, 4, "padding", "valid" if by_name else 0)
    return _Conv(
        x,
        weight,
        argument(node, 2, "bias"),
        stride,
        _sides(given, shape(weight)[2:], dilation),
        dilation,
        argument(node, 6, "groups", 1),
    )


def _sides(given: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    """What is added before and after each dimension; of an odd sum the larger half comes after."""
    if given == "same":
        sums = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((s // 2, s - s // 2) for s in sums)
    numbers = _each(0 if given == "valid" else given, len(kernel))
    return tuple((number, number) for number in numbers)


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * (dimensions // len(values)))


def _conv2d(build: _Builder, conv: _Conv) -> Node:
    """Unequal sides are padded before the convolution, which lowering makes its own."""
    x, (rows, columns) = conv.x, conv.padding
    if rows[0] != rows[1] or columns[0] != columns[1]:
        x, rows, columns = build(CONSTANT_PAD, x, [*columns, *rows], 0.0), (0, 0), (0, 0)
    return build(
        CONV2D,
        x,
        conv.weight,
        conv.bias,
        list(conv.stride),
        [rows[0], columns[0]],
        list(conv.dilation),
        conv.groups,
    )


def _from_1d(build: _Builder, conv: _Conv) -> Node:
    flat = replace(
        conv,
        x=build(aten.unsqueeze.default, conv.x, 2),
        weight=build(aten.unsqueeze.default, conv.weight, 2),
        stride=(1, *conv.stride),
        padding=((0, 0), *conv.padding),
        dilation=(1, *conv.dilation),
    )
    return build(aten.squeeze.dim, _conv2d(build, flat), 2)


def _from_3d(build: _Builder, conv: _Conv) -> Node:
    pointwise = tuple(shape(conv.weight)[3:]) == (1, 1)
    if pointwise and conv.stride[1:] == (1, 1) and conv.padding[1:] == ((0, 0), (0, 0)):
        return _over_time(build, conv)
    return _over_frames(build, conv)


def _over_time(build: _Builder, conv: _Conv) -> Node:
    """[B, C, T, H, W] as an image of height T and width H * W."""
    flat = replace(
        conv,
        x=build(aten.flatten.using_ints, conv.x, 3, 4),
        weight=build(aten.squeeze.dim, conv.weight, 4),
        stride=(conv.stride[0], 1),
        padding=(conv.padding[0], (0, 0)),
        dilation=(conv.dilation[0], 1),
    )
    sides = [build.size(conv.x, axis) for axis in (3, 4)]
    return build(aten.unflatten.int, _conv2d(build, flat), 3, sides)


def _over_frames(build: _Builder, conv: _Conv) -> Node:
    """[B, C, T, H, W] as B * T' images, each with the frames that its taps read as channels."""
    taps = _taps(build, conv)
    x = taps[0] if len(taps) == 1 else build(aten.cat.default, taps, 1)
    weight = build(aten.permute.default, conv.weight, [0, 2, 1, 3, 4])
    flat = replace(
        conv,
        x=build(aten.flatten.using_ints, build(aten.transpose.int, x, 1, 2), 0, 1),
        weight=build(aten.flatten.using_ints, weight, 1, 2),
        stride=conv.stride[1:],
        padding=conv.padding[1:],
        dilation=conv.dilation[1:],
    )
    leading = [build.size(x, 0), build.size(x, _TIME)]
    frames = build(aten.unflatten.int, _conv2d(build, flat), 0, leading)
    return build(aten.transpose.int, frames, 1, 2)


def _taps(build: _Builder, conv: _Conv) -> list[Node]:
    """For each tap in time the frames that it multiplies, one for every frame of the result."""
    x, count, (before, after) = conv.x, shape(conv.weight)[2], conv.padding[0]
    if before or after:
        x = build(CONSTANT_PAD, x, [0, 0, 0, 0, before, after], 0.0)
    if count == 1 and conv.stride[0] == 1:
        return [x]
    found = []
    for tap in range(count):
        start, left = tap * conv.dilation[0], (count - 1 - tap) * conv.dilation[0]
        end = -left if left else 2**63 - 1
        found.append(build(aten.slice.Tensor, x, _TIME, start, end, conv.stride[0]))
    return found
