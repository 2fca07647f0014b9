"""Give both halves of a concatenated shortcut a quantiser of their own."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from fxquant.graph.nodes import (
    CONV2D,
    argument,
    aten,
    attribute,
    call,
    calls,
    free_target,
    get_attr,
    is_learned,
    replace,
    set_buffer,
    set_parameter,
    shape,
)
from fxquant.graph.options import Options


def split_shortcut(gm: GraphModule, *, options: Options) -> GraphModule:
    """A 1x1 convolution of cat(h, skip) becomes the sum of two (Q-Diffusion's shortcut split).

    h and skip differ in range; one scale over both wastes levels on the smaller.

        %cat: f32[Bx64x8hx8w] = cat([%h, %skip], 1)
        %conv2d: f32[Bx32x8hx8w] = conv2d(%cat, conv_shortcut.weight, conv_shortcut.bias)
    becomes
        %conv2d_1: f32[Bx32x8hx8w] = conv2d(%h, conv_shortcut.weight_0, conv_shortcut.bias)
        %conv2d_2: f32[Bx32x8hx8w] = conv2d(%skip, conv_shortcut.weight_1)
        %add: f32[Bx32x8hx8w] = add(%conv2d_1, %conv2d_2)
    """
    if not options.recipe.split_shortcut:
        return gm
    for conv in calls(gm, CONV2D):
        if _is_concatenated_shortcut(conv):
            _split(gm, conv)
    return gm


def _is_concatenated_shortcut(conv: Node) -> bool:
    source, weight = conv.args[:2]
    if not isinstance(source, Node) or source.target is not aten.cat.default:
        return False
    assert isinstance(weight, Node)
    if weight.op != "get_attr":
        return False
    dim, parts = argument(source, 1, "dim", 0), source.args[0]
    one_by_one = tuple(shape(weight)[2:]) == (1, 1) and argument(conv, 6, "groups", 1) == 1
    static = all(isinstance(shape(p)[1], int) for p in parts)  # type: ignore[union-attr, arg-type]
    return dim == 1 and one_by_one and static


def _split(gm: GraphModule, conv: Node) -> None:
    source, parameter = conv.args[:2]
    assert isinstance(source, Node)
    assert isinstance(parameter, Node)
    parts: Any = source.args[0]
    name, rest = str(parameter.target), tuple(conv.args[3:])
    weight, start, total = attribute(gm, name), 0, None
    bind = set_parameter if is_learned(gm, parameter) else set_buffer
    with gm.graph.inserting_before(conv):
        for k, part in enumerate(parts):
            stop = start + shape(part)[1]
            target = bind(gm, free_target(gm, f"{name}_{k}"), weight[:, start:stop].detach())
            bias = argument(conv, 2, "bias") if k == 0 else None
            args = (part, get_attr(gm, target, like=conv), bias, *rest)
            piece = call(gm, CONV2D, args, like=conv)
            total = piece if total is None else call(gm, aten.add.Tensor, (total, piece), like=conv)
            start = stop
    assert total is not None
    replace(conv, total)
