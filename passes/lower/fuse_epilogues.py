"""Move what follows a layer elementwise into the layer."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from fxquant.graph.lowered import LAYERS, arguments, ops, take_over
from fxquant.graph.nodes import argument, aten, calls, is_symbolic, only_user, shape
from fxquant.graph.options import Options


def fuse_epilogues(gm: GraphModule, *, options: Options) -> GraphModule:
    """Time-embedding add, SiLU or GELU, and residual add, in this order, join conv2d and linear.

        %conv2d: f32[Bx32x8hx8w] = fxquant.conv2d(%fq_0, ...)
        %add: f32[Bx32x8hx8w] = add(%conv2d, %unsqueeze)
        %add_1: f32[Bx32x8hx8w] = add(%x, %conv2d_1)
    becomes
        %add: f32[Bx32x8hx8w] = fxquant.conv2d(%fq_0, ..., channel_add=%linear)
        %add_1: f32[Bx32x8hx8w] = fxquant.conv2d(%fq_1, ..., residual=%x)
    """
    for layer in calls(gm, *LAYERS):
        fused: Node | None = layer
        while fused is not None:
            fused = _fuse_next(gm, fused)
    return gm


def _fuse_next(gm: GraphModule, layer: Node) -> Node | None:
    user = only_user(layer)
    if user is None or user.op != "call_function":
        return None
    for change in (_channel_add, _activation, _residual):
        fields = change(layer, user)
        if fields:
            return _merge(gm, layer, user, fields)
    return None


def _merge(gm: GraphModule, layer: Node, user: Node, fields: dict[str, Any]) -> Node:
    """The layer moves to its user's place, where every operand is available."""
    args = tuple({**arguments(layer), **fields}.values())
    new = take_over(gm, user, layer.target, args, like=layer)
    gm.graph.erase_node(layer)
    return new


def _channel_add(layer: Node, user: Node) -> dict[str, Any] | None:
    """conv2d + [B, C, 1, 1]."""
    now = arguments(layer)
    if layer.target is not ops.conv2d.default or not _is_plain_add(user):
        return None
    other = _other(user, layer)
    if now["channel_add"] or now["activation"] != "none" or now["residual"] or other is None:
        return None
    vector = _per_channel_vector(other)
    return (
        {"channel_add": vector}
        if vector is not None and shape(vector)[-1] == shape(layer)[1]
        else None
    )


def _per_channel_vector(node: Node) -> Node | None:
    """[B, C] behind [:, :, None, None]."""
    for _ in range(2):
        if node.target is not aten.unsqueeze.default or argument(node, 1, "dim") not in (2, 3, -1):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return node if len(shape(node)) == 2 else None


def _activation(layer: Node, user: Node) -> dict[str, Any] | None:
    now = arguments(layer)
    if now["activation"] != "none" or now["residual"]:
        return None
    name = activation_name(user)
    return {"activation": name} if name else None


def activation_name(node: Node) -> str | None:
    """silu, gelu or gelu_tanh, if the node is one."""
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return (
            "gelu_tanh"
            if node.kwargs.get("approximate", argument(node, 1, "approximate", "none")) == "tanh"
            else "gelu"
        )
    return None


def _residual(layer: Node, user: Node) -> dict[str, Any] | None:
    """layer + a tensor of its shape. Of two layers that are added the later one takes the sum."""
    if arguments(layer)["residual"] or not _is_plain_add(user):
        return None
    other = _other(user, layer)
    if other is None or [str(s) for s in shape(other)] != [str(s) for s in shape(layer)]:
        return None
    if other.target in LAYERS and only_user(other) is user and layer < other:
        return None
    return {"residual": other}


def _is_plain_add(node: Node) -> bool:
    return node.target is aten.add.Tensor and argument(node, 2, "alpha", 1) == 1


def _other(add: Node, one: Node) -> Node | None:
    others = [a for a in add.args[:2] if a is not one]
    if len(others) != 1 or not isinstance(others[0], Node) or is_symbolic(others[0]):
        return None
    return others[0]
