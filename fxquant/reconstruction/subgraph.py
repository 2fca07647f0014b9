"""Cuts a reconstruction unit out of the fake-quant graph as a graph module of its own.

What is trained is what is lowered: the unit's nodes are the fake-quant graph's. Activations and
weights from outside become inputs, so the unit is a pure function of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxquant.graph.edges import Edge, edge_source, layout_chain
from fxquant.graph.nodes import is_layer, is_symbolic, module_path, note
from fxquant.graph.samples import has_samples
from fxquant.graph.segment import before
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight

ROW = "row"


@dataclass(frozen=True)
class Unit:
    """One unit of a fake-quant graph.

    Attributes:
        path, kind: module path and class name.
        nodes: all of it, in order.
        inputs: outside nodes it reads, in order.
        outputs: its nodes that are read outside.
        inner: layers inside that do not produce an output themselves.
        weights: its fake_quantize_weight nodes.
        quantisers: indices of its activation quantisers that no earlier unit has.
    """

    path: str
    kind: str
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    inner: tuple[Node, ...]
    weights: tuple[Node, ...]
    quantisers: tuple[int, ...]


def units(gm: GraphModule, by_layer: bool = False) -> list[Unit]:
    """The quantised units that can be trained, in execution order; see `all_units`."""
    return all_units(gm, by_layer)[0]


def all_units(gm: GraphModule, by_layer: bool = False) -> tuple[list[Unit], list[Unit]]:
    """The quantised units that can be trained, and those that cannot, in execution order.

    A unit is trained on its values sample by sample, so what all samples have together stays.

    Args:
        gm: a specialised graph after group_units.
        by_layer: every layer is a unit of its own, with its quantisers.
    """
    members = _layers(gm) if by_layer else _blocks(gm)
    position = {node: k for k, node in enumerate(gm.graph.nodes)}
    ordered = {
        key: sorted({*nodes, *_sizes(nodes)}, key=position.__getitem__)
        for key, nodes in members.items()
    }
    found, others = list[Unit](), list[Unit]()
    taken: set[int] = set()
    for (path, kind), nodes in sorted(ordered.items(), key=lambda item: position[item[1][-1]]):
        # quantisers and layout operators on the way into a layer may be another layer's as well
        outputs = tuple(filter(is_layer, nodes)) if by_layer else _read_outside(nodes)
        unit = _unit(path, kind, nodes, outputs, taken)
        if not unit.weights:
            continue
        if all(_by_sample(n) for n in (*unit.inputs, *unit.outputs)):
            found.append(unit)
            taken |= set(unit.quantisers)
        else:
            others.append(unit)
    return found, others


def extract(
    gm: GraphModule, unit: Unit, quantiser: Callable[..., Tensor] | None, *options: float
) -> GraphModule:
    """The unit as a function (*inputs, row, *weights) -> (*outputs, *inner).

    Args:
        quantiser: takes the place of fake_quantize, with `options` as further arguments; None
            leaves activations float.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in unit.inputs:
        copies[node] = graph.placeholder(node.name)
    row = graph.placeholder(ROW)
    for node in unit.weights:
        copies[node] = graph.placeholder(node.name)
    for node in unit.nodes:
        if node in copies:
            continue
        if node.target is fake_quantize:
            source, _, index, bits = node.args
            assert isinstance(source, Node)
            value = _argument(graph, copies, source)
            args = (value, row, index, bits, *options)
            copies[node] = graph.call_function(quantiser, args) if quantiser else value
        else:
            copies[node] = graph.node_copy(node, lambda n: _argument(graph, copies, n))
    graph.output(tuple(copies[n] for n in (*unit.outputs, *unit.inner)))
    return GraphModule(gm, graph, class_name="Unit")


def _blocks(gm: GraphModule) -> dict[tuple[str, str], list[Node]]:
    """Members by (path, kind), as group_units noted them."""
    found: dict[tuple[str, str], list[Node]] = {}
    for node in gm.graph.nodes:
        if note(node, "unit"):
            path, kind = note(node, "unit")
            found.setdefault((path, kind), []).append(node)
    return found


def _layers(gm: GraphModule) -> dict[tuple[str, str], list[Node]]:
    """Each quantised layer with the quantiser and the layout operators it reads through."""
    found: dict[tuple[str, str], list[Node]] = {}
    for layer in filter(is_layer, gm.graph.nodes):
        edge = Edge(layer, "input")
        source, weight = edge_source(edge), layer.args[1]
        if source.target is fake_quantize and isinstance(weight, Node):
            path, kind = module_path(layer), note(layer, "stack")[-1][1]
            calls = sum(1 for other, _ in found if other.partition(":")[0] == path)
            key = (f"{path}:{calls + 1}" if calls else path, kind)
            found[key] = [source, *layout_chain(edge), weight, layer]
    return found


def _unit(
    path: str,
    kind: str,
    nodes: list[Node],
    outputs: tuple[Node, ...],
    taken: set[int],
) -> Unit:
    inside = set(nodes)
    weights = tuple(n for n in nodes if n.target is fake_quantize_weight)
    last = {_producer(output, inside) for output in outputs}
    inner = tuple(n for n in nodes if is_layer(n) and n not in last and _by_sample(n))
    quantisers = {int(n.args[2]) for n in nodes if n.target is fake_quantize}  # type: ignore[arg-type]
    return Unit(
        path,
        kind,
        tuple(nodes),
        _outside_inputs(nodes, inside),
        outputs,
        inner,
        weights,
        tuple(sorted(quantisers - taken)),
    )


def _by_sample(node: Node) -> bool:
    """Can the value be cached sample by sample?"""
    return isinstance(node.meta["val"], Tensor) and has_samples(node)


def _read_outside(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The tensors that other nodes read; weights aside."""
    inside = set(nodes)
    return tuple(
        n
        for n in nodes
        if n.target is not fake_quantize_weight
        and not is_symbolic(n)
        and any(user not in inside for user in n.users)
    )


def _sizes(nodes: Iterable[Node]) -> set[Node]:
    """The size computations that nodes need; the unit repeats them for its own batch."""
    found: set[Node] = set()
    pending = [n for node in nodes for n in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if is_symbolic(node) and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _outside_inputs(nodes: Iterable[Node], inside: set[Node]) -> tuple[Node, ...]:
    read: dict[Node, None] = {}
    for node in nodes:
        if node.target is fake_quantize_weight:
            continue
        for source in node.all_input_nodes:
            outside = source not in inside and source.op != "get_attr" and source.name != ROW
            if outside:
                read[source] = None
    return tuple(read)


def _producer(output: Node, inside: set[Node]) -> Node | None:
    """The last layer that reaches the output without passing another layer."""
    reached = before([output], stop=[n for n in output.graph.nodes if n not in inside])
    layers = {n for n in reached if is_layer(n)}
    hidden = before([n for layer in layers for n in layer.all_input_nodes])
    return max(layers - hidden, default=None)


def _argument(graph: Graph, copies: dict[Node, Node], node: Node) -> Node:
    """A copied node, or a parameter read where it is needed."""
    if node not in copies:
        assert node.op == "get_attr", f"%{node.name} is neither inside the unit nor an input"
        copies[node] = graph.get_attr(str(node.target))
    return copies[node]
