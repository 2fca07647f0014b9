"""Multiply with the samples as the outermost axis, as torch's own attention module does not."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxquant.graph.nodes import LINEAR, aten, call, calls, counts_samples, replace, shape
from fxquant.graph.options import Options

_TOKENS_FIRST = [2, 0, 1, 3]  # [B, heads, L, d] as [L, B, heads, d]


def samples_first(gm: GraphModule, *, options: Options) -> GraphModule:
    """A linear works on the last axis; transposing the others can wait until after it.

    nn.MultiheadAttention puts tokens before samples, [L, B, C] or [L * B, C]. Its quantisers would
    then not know whose timestep a row is of, nor its reconstruction which rows a sample has.

        %transpose: f32[6xBx16] = transpose(%x, 0, 1)
        %linear: f32[6xBx48] = linear(%transpose, in_proj_weight, in_proj_bias)
    becomes
        %linear: f32[Bx6x48] = linear(%x, in_proj_weight, in_proj_bias)
        %transpose: f32[6xBx48] = transpose(%linear, 0, 1)
    and likewise for the attention's result, whose heads are joined on the way.
    """
    for layer in calls(gm, LINEAR):
        source = layer.args[0]
        assert isinstance(source, Node)
        with gm.graph.inserting_before(layer):
            if _swaps(gm, source):
                product = _linear(gm, layer, source.args[0])  # type: ignore[arg-type]
                replace(layer, _call(gm, layer, aten.transpose.int, product, 0, 1))
            elif (joined := _joined_heads(gm, layer, source)) is not None:
                product = _linear(gm, layer, joined)
                tokens_first = _call(gm, layer, aten.transpose.int, product, 0, 1)
                replace(layer, _call(gm, layer, aten.flatten.using_ints, tokens_first, 0, 1))
    gm.graph.eliminate_dead_code()
    return gm


def _joined_heads(gm: GraphModule, layer: Node, source: Node) -> Node | None:
    """[B, L, heads * d] of what the linear reads as [L * B, heads * d]; None of anything else."""
    moved = source.args[0] if source.target is aten.reshape.default else None
    if not isinstance(moved, Node) or len(shape(source)) != 2:
        return None
    width, size = shape(source)[1], shape(moved)[-1]
    if _swaps(gm, moved) and isinstance(width, int) and isinstance(size, int):
        split = [-1, width // size]
        heads = _call(gm, layer, aten.unflatten.int, moved.args[0], 0, split)
    elif moved.target is aten.permute.default and moved.args[1] == _TOKENS_FIRST:
        heads = moved.args[0]  # type: ignore[assignment]
    else:
        return None
    if not counts_samples(gm, shape(heads)[0]) or _product(shape(heads)[1], size) != width:
        return None
    by_token = _call(gm, layer, aten.transpose.int, heads, 1, 2)
    return _call(gm, layer, aten.flatten.using_ints, by_token, 2, 3)


def _product(heads: object, size: object) -> int | None:
    return heads * size if isinstance(heads, int) and isinstance(size, int) else None


def _swaps(gm: GraphModule, node: Node) -> bool:
    """Does it put the second axis before that of the samples?"""
    if node.target is not aten.transpose.int or {*node.args[1:]} != {0, 1}:
        return False
    first, second, *_ = shape(node.args[0])  # type: ignore[arg-type]
    right = counts_samples(gm, first) and not counts_samples(gm, second)
    return len(shape(node)) == 3 and right


def _linear(gm: GraphModule, layer: Node, x: Node) -> Node:
    return call(gm, LINEAR, (x, *layer.args[1:]), dict(layer.kwargs), like=layer)


def _call(gm: GraphModule, like: Node, target: object, *args: object) -> Node:
    return call(gm, target, args, like=like)  # type: ignore[arg-type]
