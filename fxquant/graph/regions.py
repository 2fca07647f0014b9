"""Regions under a context manager: torch.autocast, torch.no_grad, torch.enable_grad.

torch.export keeps each as a graph of its own and a call that runs it. A graph without gradients
has no use for the latter two, and autocast changes nothing where it is switched off.
"""

from __future__ import annotations

import operator
from typing import Any

from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch.fx import GraphModule, Node

from fxquant.errors import CaptureError
from fxquant.graph.source import source_line

_ARGUMENTS = {wrap_with_autocast: 4, wrap_with_set_grad_enabled: 1}  # before the region's graph
_FUNCTORCH = "functorch"  # whose functions begin and end what runs under vmap
_ENABLED = 2  # which of autocast's says whether it is on


def inline_regions(gm: GraphModule, device: str) -> None:
    """Put the operators of each region where it is called.

        %getitem = getitem(wrap_with_autocast('cpu', None, False, None, %submod_1, %conv2d), 0)
    becomes what the graph `submod_1` holds:
        %to: f32[Bx16x8x8] = to(%conv2d, float32)

    Args:
        device: the type of the model's; autocast for another does nothing.

    Raises CaptureError for a region in which autocast would choose dtypes, and under torch.vmap.
    """
    for node in list(gm.graph.nodes):
        if _FUNCTORCH in str(getattr(node.target, "__module__", "")):
            raise CaptureError(_mapped(gm, node))
        if node.target in _ARGUMENTS:
            _inline(gm, node, device)
    gm.graph.lint()


def _inline(gm: GraphModule, call: Node, device: str) -> None:
    """One region, and those in it."""
    before = _ARGUMENTS[call.target]  # type: ignore[index]
    region = call.args[before]
    assert isinstance(region, Node)
    path = str(region.target)
    inner = _at(gm, path)
    if call.target is wrap_with_autocast and call.args[0] == device and call.args[_ENABLED]:
        raise CaptureError(_refusal(call, inner))
    given = iter(call.args[before + 1 :])
    copies: dict[Node, Any] = {}
    with gm.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                results = [copies[n] for n in node.args[0]]
            else:
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    copies[node].target = f"{path}.{node.target}"
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not region.users:
        gm.graph.erase_node(region)
    for copy in copies.values():
        if isinstance(copy, Node) and copy.target in _ARGUMENTS and copy.graph is gm.graph:
            _inline(gm, copy, device)


def _at(gm: GraphModule, path: str) -> GraphModule:
    found = gm.get_submodule(path)
    assert isinstance(found, GraphModule)
    return found


def _refusal(call: Node, inner: GraphModule) -> str:
    lines = [source_line(node) for node in inner.graph.nodes]
    place = next((line for line in lines if line), "in forward")
    return (
        f"a region under torch.autocast({call.args[0]!r}) ({place}) chooses dtypes as it runs, "
        "which a captured graph cannot: cast there, with .to(dtype), or take the region out. "
        "fxquant computes in 16 bits wherever that is enough"
    )


def _mapped(gm: GraphModule, node: Node) -> str:
    """The first line that a function under vmap was called in; not all of its nodes know theirs."""
    rest = list(gm.graph.nodes)
    lines = [source_line(other) for other in rest[rest.index(node) :]]
    place = next((line for line in lines if line), "in forward")
    return (
        f"a function under torch.vmap ({place}) cannot be compiled: its tensors have a dimension "
        "that no operator sees. Masks of flex_attention (create_block_mask) are made so: choose "
        "another attention backend or processor, or compute it with a dimension of its own"
    )
