"""What must hold after each stage: a table of predicates over the graph, each with its sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import GraphModule, Node

from fxquant.graph.edges import Edge, edge_source, edges, quantised_edges
from fxquant.graph.nodes import aten, is_layer, is_random, note
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight

Check = Callable[[GraphModule], Iterator[str]]

OBSERVERS = "observers"


def values_are_fresh(gm: GraphModule) -> Iterator[str]:
    """Every computed node carries an example value."""
    for node in gm.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield f"%{node.name} has no example value (insert nodes with fxquant.graph.nodes.call)"


def no_noops(gm: GraphModule) -> Iterator[str]:
    """Prepared graphs hold no view, no assert, and no dropout that drops nothing."""
    banned = (aten.dropout.default, aten.view.default, aten._assert_tensor_metadata.default)
    for node in gm.graph.nodes:
        if node.target in banned and not is_random(node):
            yield f"%{node.name} should have been stripped"


def layers_are_decided(gm: GraphModule) -> Iterator[str]:
    """Every conv2d and linear has a spec or a reason to stay float."""
    for node in filter(is_layer, gm.graph.nodes):
        quant = note(node, "quant")
        if not quant or not ({"input", "weight"} <= set(quant) or "float" in quant):
            yield f"%{node.name} has neither a spec nor a reason to stay float"


def specs_are_not_dangling(gm: GraphModule) -> Iterator[str]:
    """Only layers and attention carry specs, and quantiser indices are 0..n-1."""
    seen: set[int] = set()
    for node in gm.graph.nodes:
        if "float" not in note(node, "quant", {"float"}) and not edges(node):
            yield f"%{node.name} carries a spec but is no layer and no attention"
        seen |= {edge.spec["index"] for edge in quantised_edges(node) if edge.spec}
    if seen and seen != set(range(len(seen))):
        yield f"quantiser indices have gaps: {sorted(seen)}"


def edges_are_observed(gm: GraphModule) -> Iterator[str]:
    """Every annotated edge comes from an observer."""
    for node in gm.graph.nodes:
        for edge in quantised_edges(node):
            if quantiser_of(edge, _is_observer) is None:
                yield f"%{node.name} is annotated but reads {_said(edge)} from no observer"


def edges_are_fake_quantised(gm: GraphModule) -> Iterator[str]:
    """Observers are gone; annotated edges are fake-quantised, and the layers' weights."""
    for node in gm.graph.nodes:
        if _is_observer(node):
            yield f"%{node.name} is still an observer"
        found = quantised_edges(node)
        for edge in found:
            if quantiser_of(edge, lambda n: n.target is fake_quantize) is None:
                yield f"%{node.name} reads {_said(edge)} that is not fake-quantised"
        if found and is_layer(node) and node.args[1].target is not fake_quantize_weight:
            yield f"%{node.name} reads a weight that is not fake-quantised"


def units_are_convex(gm: GraphModule) -> Iterator[str]:
    """No path leaves a reconstruction unit and comes back (each could not run as one piece)."""
    bits: dict[str, int] = {}
    outside: dict[Node, int] = {}
    for node in gm.graph.nodes:
        unit = (note(node, "unit") or [None])[0]
        left = 0
        for source in node.all_input_nodes:
            left |= outside[source]
            origin = (note(source, "unit") or [None])[0]
            if origin is not None and origin != unit:
                left |= bits.setdefault(origin, 1 << len(bits))
        if unit is not None and left & bits.setdefault(unit, 1 << len(bits)):
            yield f"unit {unit} is not convex: %{node.name} depends on it through another unit"
            left &= ~bits[unit]
        outside[node] = left


STAGES: dict[str, tuple[Check, ...]] = {
    "captured": (values_are_fresh,),
    "prepared": (values_are_fresh, no_noops),
    "annotated": (values_are_fresh, no_noops, layers_are_decided, specs_are_not_dangling),
    "observed": (values_are_fresh, specs_are_not_dangling, edges_are_observed),
    "fake_quantized": (values_are_fresh, specs_are_not_dangling, edges_are_fake_quantised),
    "grouped": (values_are_fresh, edges_are_fake_quantised, units_are_convex),
    "lowered": (values_are_fresh,),
}


def violations(gm: GraphModule, stage: str) -> list[str]:
    """Sentences for every invariant of the stage that the graph breaks."""
    return [problem for check in STAGES[stage] for problem in check(gm)]


def quantiser_of(edge: Edge, wanted: Callable[[Node], bool]) -> Node | None:
    """The observer or fake-quant node an edge comes from, through layout operators."""
    source = edge_source(edge)
    return source if wanted(source) else None


def _said(edge: Edge) -> str:
    return "an input" if edge.name == "input" else f"a {edge.name}"


def _is_observer(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(OBSERVERS + ".")
