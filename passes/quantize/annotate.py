"""Decide, edge by edge, what is quantised and how. Nothing is inserted here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.errors import RecipeError
from fxquant.graph.edges import Edge, edge_root, edges
from fxquant.graph.nodes import (
    CONV2D,
    argument,
    is_attention,
    is_layer,
    is_learned,
    module_path,
    shape,
    write_note,
)
from fxquant.graph.options import Options
from fxquant.graph.precision import layers_of_numbers
from fxquant.graph.weighted import is_weighted
from fxquant.quant.spec import QuantSpec
from fxquant.recipe import KEEP_FLOAT, Override, Recipe, weight_observer_for
from fxquant.reconstruction.units import unit_of

_KERNEL_BITS = 8


def annotate(gm: GraphModule, *, options: Options) -> GraphModule:
    """Every conv2d and linear gets a spec for its input and weight, or a reason to stay float.

    Attention gets specs for q, k and v where the recipe wants it in int8. Edges of one unit that
    read the same value share a quantiser, numbered in execution order.
    Raises RecipeError where a pattern of the recipe names no layer.

        %conv2d: f32[Bx32x8hx8w] = conv2d(%silu, conv1.weight, conv1.bias, [1, 1], ...)
    becomes
        %conv2d: f32[Bx32x8hx8w] = conv2d(%silu:u8/t, conv1.weight:i8/c0, conv1.bias, [1, 1], ...)
    """
    recipe = options.recipe
    layers = [n for n in gm.graph.nodes if is_layer(n)]
    others = [n for n in gm.graph.nodes if is_weighted(gm, n)]
    attention = [n for n in gm.graph.nodes if is_attention(n) and recipe.attention == "int8"]
    _check_patterns(recipe, [*layers, *others, *attention])
    fixed, numbers = _without_inputs(gm), layers_of_numbers(gm)
    reasons = {layer: _reason_to_stay_float(gm, layer, recipe, fixed) for layer in layers}
    for layer in numbers:
        reasons[layer] = reasons[layer] or {"float": "it reads a few exact numbers, such as a time"}
    reasons |= {node: _reason_of_other(node, recipe) for node in others}
    _check_overrides(recipe, reasons)
    weights = {n: specs(n, recipe)[1] for n, reason in reasons.items() if reason is None}
    shares: dict[Edge, tuple[Any, ...]] = {}
    for node in gm.graph.nodes:
        for edge in edges(node):
            if node in weights:
                shares[edge] = _sharing(node, specs(node, recipe)[0], weights[node].bits)
            elif node in attention and _kept_float(node, recipe) is None:
                shares[edge] = _sharing(node, _attention_spec(recipe), _KERNEL_BITS)
    indices: dict[tuple[Any, ...], int] = {}
    notes: dict[Node, dict[str, Any]] = {n: r for n, r in reasons.items() if r is not None}
    for edge, key in shares.items():
        root, _ = edge_root(edge, {e for e, other in shares.items() if other == key})
        index = indices.setdefault((root, *key), len(indices))
        notes.setdefault(edge.reader, {})[edge.name] = {**key[1].to_json(), "index": index}
    for node, found in notes.items():
        weight = {"weight": weights[node].to_json()} if node in weights else {}
        write_note(node, quant=found | weight)
    return gm


def specs(layer: Node, recipe: Recipe) -> tuple[QuantSpec, QuantSpec]:
    """Activation and weight spec of a layer, overrides applied."""
    changes: dict[str, Any] = {}
    for override in _overrides(layer, recipe):
        changes |= override.changes()
    bits = changes.get("weight_bits", recipe.weight_bits)
    observer = weight_observer_for(bits) if "weight_bits" in changes else recipe.weight_observer
    axis = None if changes.get("weight_granularity") == "tensor" else 0
    activation = QuantSpec(
        changes.get("activation_bits", recipe.activation_bits),
        changes.get("activation_symmetric", recipe.activation_symmetric),
        None,
        recipe.activation_observer,
        learned=True,
    )
    return activation, QuantSpec(bits, True, axis, observer)


def _attention_spec(recipe: Recipe) -> QuantSpec:
    """Of q, k and v: 8 bits at any bit width of the layers, as EDA-DM quantises these products."""
    return QuantSpec(
        _KERNEL_BITS,
        recipe.activation_symmetric,
        None,
        recipe.activation_observer,
        learned=True,
    )


def _sharing(reader: Node, activation: QuantSpec, weight_bits: int) -> tuple[Any, ...]:
    """Edges share the quantiser of a value they all read when this is equal, too.

    What no kernel can multiply stays simulated, and so does its quantiser.
    """
    return (unit_of(reader) or [""])[0], activation, weight_bits <= _KERNEL_BITS


def _reason_to_stay_float(
    gm: GraphModule, layer: Node, recipe: Recipe, fixed: Collection[Node]
) -> dict[str, Any] | None:
    """The note of a float layer, `unplanned` if the recipe did not ask for it; None to quantise."""
    kept = _kept_float(layer, recipe)
    if kept:
        return {"float": f"recipe keeps {kept} float"}
    x, weight = layer.args[:2]
    assert isinstance(x, Node)
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return {"float": "its weight is computed from inputs, not a parameter", "unplanned": True}
    if not is_learned(gm, weight):
        return {"float": "its weight is a fixed filter, not a parameter"}
    if 0 in shape(weight):
        return {"float": "its weight is empty"}
    for holds, why in (
        (argument(layer, 6, "groups", 1) != 1, "grouped convolutions have no integer kernel"),
        (layer.target is CONV2D and len(shape(x)) != 4, "its input has no batch"),
        (x in fixed, "its input is no value of a sample but of the model"),
    ):
        if holds:
            return {"float": why, "unplanned": True}
    return None


def _reason_of_other(node: Node, recipe: Recipe) -> dict[str, Any]:
    """The same of an operator with learned values that is no layer."""
    kept = _kept_float(node, recipe)
    if kept:
        return {"float": f"recipe keeps {kept} float"}
    name = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
    return {"float": f"{name} has no integer kernel", "unplanned": True}


def _without_inputs(gm: GraphModule) -> set[Node]:
    """What is computed from attributes and numbers alone."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        computed = node.op in ("get_attr", "call_function")
        if computed and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _kept_float(layer: Node, recipe: Recipe) -> str | None:
    """The pattern of the recipe that keeps a layer float."""
    kept = next((p for p in recipe.keep_float if _matches(p, layer)), None)
    for override in _overrides(layer, recipe):
        if override.keep_float is not None:
            kept = override.pattern if override.keep_float else None
    return kept


def _overrides(layer: Node, recipe: Recipe) -> Iterable[Override]:
    return (o for o in recipe.overrides if _matches(o.pattern, layer))


def _matches(pattern: str, layer: Node) -> bool:
    """Does the pattern name the layer's module or its unit?"""
    names = (module_path(layer), (unit_of(layer) or [""])[0])
    return any(fnmatchcase(name, pattern) for name in names)


def _check_patterns(recipe: Recipe, layers: Sequence[Node]) -> None:
    """Refuse patterns that name no layer; the default ones cover many models and may."""
    patterns = [p for p in recipe.keep_float if p not in KEEP_FLOAT]
    patterns += [o.pattern for o in recipe.overrides]
    unmatched = [p for p in dict.fromkeys(patterns) if not any(_matches(p, n) for n in layers)]
    if unmatched:
        lines = [f"{p!r}{_near_modules(p, layers)}" for p in unmatched]
        raise RecipeError(
            "these patterns of the recipe match no convolution or linear layer of this model, nor "
            "a unit of one:\n  "
            + "\n  ".join(lines)
            + "\nCorrect or remove them; `fxquant dump MODEL --after annotate` lists the layers."
        )


def _near_modules(pattern: str, layers: Sequence[Node]) -> str:
    """'; near: ...', the modules with layers in them whose path is most like the pattern."""
    modules: dict[str, None] = {}
    for layer in layers:
        parts = module_path(layer).split(".")
        modules |= dict.fromkeys(".".join(parts[: k + 1]) for k in range(len(parts)))
    close = difflib.get_close_matches(pattern.replace("*", "").strip("."), modules, 3, 0.4)
    return f"; near: {', '.join(close)}" if close else ""


def _check_overrides(recipe: Recipe, reasons: dict[Node, dict[str, Any] | None]) -> None:
    """Refuse an override of layers that all stay float: it would silently do nothing."""
    for override in recipe.overrides:
        named = [reason for n, reason in reasons.items() if _matches(override.pattern, n)]
        if override.keep_float is True or None in named:
            continue
        why = next(reason["float"] for reason in named if reason)
        raise RecipeError(
            f"the override of {override.pattern!r} has no effect: every layer that it names stays "
            f"float, since {why}. Remove it"
            + (", or give it keep_float=False" if override.keep_float is None else "")
        )
