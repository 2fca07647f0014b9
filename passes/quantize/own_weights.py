"""Give every quantised layer a weight that nothing else reads."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxquant.graph.nodes import (
    attribute,
    free_target,
    get_attr,
    is_layer,
    module_path,
    note,
    set_parameter,
    write_note,
)
from fxquant.graph.options import Options


def own_weights(gm: GraphModule, *, options: Options) -> GraphModule:
    """A weight of several readers is bound again under other names, one a quantised layer.

    Each layer may then round it in its own way, and what else reads it keeps the floats. Names
    share the values until they are rounded.

        %linear: f32[Bx6x16] = linear(%x:u8/t, a.weight:i8/c0, a.bias)
        %linear_1: f32[Bx6x16] = linear(%silu:u8/t, a.weight:i8/c0, a.bias)
    becomes
        %linear: f32[Bx6x16] = linear(%x:u8/t, a.weight:i8/c0, a.bias)
        %linear_1: f32[Bx6x16] = linear(%silu:u8/t, a.weight_2:i8/c0, a.bias)
    """
    readers: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    for name, found in readers.items():
        if len(found) > 1:
            for layer in _without_keeper(name, found):
                _rebind(gm, layer, name)
    return gm


def _without_keeper(name: str, readers: list[Node]) -> list[Node]:
    """The quantised layers but for one that may keep the name, if nothing else reads it."""
    layers = [n for n in readers if _rounds(n, name)]
    if len(layers) < len(readers):
        return layers
    owners = [n for n in layers if f"{module_path(n)}." == name[: name.rfind(".") + 1]]
    keeper = (owners or layers)[0]
    return [n for n in layers if n is not keeper]


def _rounds(node: Node, name: str) -> bool:
    """Is it a quantised layer whose weight has this name?"""
    quantised = is_layer(node) and "weight" in (note(node, "quant") or {})
    return quantised and node.args[1].target == name  # type: ignore[union-attr]


def _rebind(gm: GraphModule, layer: Node, name: str) -> None:
    """The name of its own module, if that is free."""
    natural = ".".join(filter(None, (module_path(layer), name.rpartition(".")[2])))
    bound = free_target(gm, natural if free_target(gm, natural) == natural else name)
    with gm.graph.inserting_before(layer):
        weight = get_attr(gm, set_parameter(gm, bound, attribute(gm, name)), like=layer)
    write_note(weight, quant=None)
    layer.update_arg(1, weight)
