"""The part of a graph between some values that are known and some that are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Graph, GraphModule, Node


def segment(gm: GraphModule, wanted: Sequence[str], known: Sequence[str] = ()) -> GraphModule:
    """A graph module of its own that computes some nodes of `gm`, sharing its weights.

    Args:
        wanted: names of the nodes to compute.
        known: names of nodes whose values are given, so that nothing before them is computed.

    Returns:
        A function of (*inputs of gm, *values of the known nodes) to a tuple of the wanted values.
    """
    by_name = {node.name: node for node in gm.graph.nodes}
    graph, copies = Graph(), {}
    for node in inputs_of(gm):
        copies[node] = graph.placeholder(node.name)
    for name in known:
        copies[by_name[name]] = graph.placeholder(f"known_{name}")
    missing = before([by_name[name] for name in wanted], stop=copies)
    for node in gm.graph.nodes:
        if node in missing:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[by_name[name]] for name in wanted))
    return GraphModule(gm, graph, class_name="Segment")


def before(nodes: Iterable[Node], stop: Iterable[Node] = ()) -> set[Node]:
    """The nodes and all they are computed from, without `stop` and what only `stop` needs."""
    ends, found = set(stop), set[Node]()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in ends and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def inputs_of(gm: GraphModule) -> list[Node]:
    """The graph's placeholders."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
