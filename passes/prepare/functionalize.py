"""Replace operators that write into their input by ones that return a new tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import PassError
from fxquant.graph.dump import line
from fxquant.graph.nodes import LAYOUT, call
from fxquant.graph.options import Options


def functionalize(gm: GraphModule, *, options: Options) -> GraphModule:
    """Every later pass may then move, repeat or drop nodes freely.

        %outer: f32[4x4] = outer(%kernel, %kernel)
        %sum_1: f32[] = sum(%outer)
        %div_: f32[4x4] = div_(%outer, %sum_1)
        %add: f32[4x4] = add(%outer, 1)
    becomes
        %div_: f32[4x4] = div(%outer, %sum_1)
        %add: f32[4x4] = add(%div_, 1)
    """
    order = {node: k for k, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        pure = _pure_counterpart(node)
        if pure is not None:
            _replace(gm, node, pure, order)
    return gm


def _pure_counterpart(node: Node) -> Any:
    """aten.div.Tensor for a call of aten.div_.Tensor; None for what is pure already."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name = target._opname.removesuffix("_")
    packet = getattr(torch.ops.aten, name, None)
    pure = getattr(packet, target._overloadname, None)
    written = node.args[0] if node.args else None
    if pure is None or pure._schema.is_mutable or not isinstance(written, Node):
        raise PassError(f"no pure counterpart of {line(node)}; rewrite that in-place operation")
    if written.target in LAYOUT or any(user.target in LAYOUT for user in written.users):
        raise PassError(
            f"{line(node)} writes into a tensor that has views, whose values would change with it; "
            "use the operation that returns a new tensor"
        )
    return pure


def _replace(gm: GraphModule, node: Node, pure: Any, order: dict[Node, int]) -> None:
    written, name = node.args[0], node.name
    assert isinstance(written, Node)
    with gm.graph.inserting_before(node):
        new = call(gm, pure, node.args, node.kwargs, like=node)
    order[new] = order[node]
    for user in list(written.users):
        if order[user] > order[node]:
            user.replace_input_with(written, new)
    node.replace_all_uses_with(new, propagate_meta=False)
    gm.graph.erase_node(node)
    new.name = name
