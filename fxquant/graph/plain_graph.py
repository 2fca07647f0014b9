"""What torch.export returns as the plain graph that passes rewrite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxquant.graph.nodes import write_note
from fxquant.graph.regions import inline_regions
from fxquant.graph.results import result_of
from fxquant.graph.signature import TIMESTEP, Signature

_PREFIX = "model"
_INPUTS_OF_PASSES = ("group", "row")  # which they add behind the call's own


def plain_graph(
    exported: torch.export.ExportedProgram, signature: Signature, device: str
) -> GraphModule:
    """The exported module without pytrees, hooks and guards, attributes named as in the model."""
    source = exported.module(check_guards=False)
    assert isinstance(source, GraphModule)
    inline_regions(source, device)
    graph = Graph()
    copies: dict[Node, Node] = {}
    attributes: dict[str, Any] = {}
    placeholders = iter(signature.names)
    for node in source.graph.nodes:
        if node.op == "placeholder":
            name = next(placeholders)
            copy = _input(graph, TIMESTEP if name == signature.timestep else _other(name))
        elif node.op == "output":
            graph.output(result_of([copies[n] for n in _returned(node.args[0])]))
            break
        elif node.op == "get_attr":
            target = str(node.target).removeprefix(_PREFIX + ".")
            attributes[target] = _attribute(source, str(node.target))
            copy = graph.create_node("get_attr", target, name=_free(target.replace(".", "_")))
        elif node.op == "call_module":
            continue  # a guards stub; it has no users
        else:
            copy = graph.node_copy(node, copies.__getitem__)
        copies[node] = copy
        copy.meta = {k: node.meta[k] for k in ("val", "stack_trace") if k in node.meta}
        write_note(copy, stack=_stack(node))
    graph.lint()
    return GraphModule(attributes, graph, class_name="Captured")


def _input(graph: Graph, name: str) -> Node:
    """A placeholder for a flat tensor. FX renames what Python or another node is called, so the
    signature goes with the graph by position: only the timestep has a name for certain."""
    word = _free(name.replace(".", "_"))
    node = graph.create_node("placeholder", word, name=word)
    node.target = node.name  # the argument's name, of which there must be one as well
    return node


def _other(name: str) -> str:
    """A name for what is not the timestep."""
    return f"{TIMESTEP}_1" if name == TIMESTEP else name


def _free(name: str) -> str:
    """A node's name that no pass will need."""
    return f"{name}_1" if name in _INPUTS_OF_PASSES else name


def _returned(value: Any) -> Iterator[Node]:
    """The nodes in an output's argument."""
    if isinstance(value, Node):
        yield value
    else:
        for item in value:
            yield from _returned(item)


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _stack(node: Node) -> list[list[str]]:
    """[[module path, class name], ...] from the outside in, without the wrapper."""
    entries = node.meta.get("nn_module_stack", {}).values()
    named = [(path, kind if isinstance(kind, str) else kind.__name__) for path, kind in entries]
    return [
        [path.removeprefix(_PREFIX).removeprefix("."), kind.rpartition(".")[2]]
        for path, kind in named
        if path.startswith(_PREFIX)
    ]
