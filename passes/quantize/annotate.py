"""Decide, edge by edge, what is quantised and how. Nothing is inserted here."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.graph.edges import edge_root
from fxquant.graph.nodes import CONSTANTS, argument, is_layer, module_path, write_note
from fxquant.graph.options import Options
from fxquant.quant.spec import QuantSpec
from fxquant.recipe import Recipe
from fxquant.reconstruction.units import unit_of


def annotate(gm: GraphModule, *, options: Options) -> GraphModule:
    """Every conv2d and linear gets a spec for its input and weight, or a reason to stay float.

    Layers of one unit that read the same value share a quantiser, numbered in execution order.

        %conv2d: f32[Bx32x8hx8w] = conv2d(%silu, conv1.weight, conv1.bias, [1, 1], [1, 1])
    becomes
        %conv2d: f32[Bx32x8hx8w] = conv2d(%silu:u8/t, conv1.weight:i8/c0, conv1.bias, [1, 1], [1, 1])
    """
    recipe = options.recipe
    layers = [n for n in gm.graph.nodes if is_layer(n)]
    reasons = {n: reason_to_stay_float(n, recipe) for n in layers}
    quantised = {n for n, reason in reasons.items() if reason is None}
    indices: dict[tuple[Any, ...], int] = {}
    for layer in layers:
        if reasons[layer]:
            write_note(layer, quant={"float": reasons[layer]})
            continue
        root, _ = edge_root(layer, quantised)
        activation, weight = specs(recipe)
        key = (root, (unit_of(layer) or [""])[0], activation)
        index = indices.setdefault(key, len(indices))
        write_note(
            layer,
            quant={"input": {**activation.to_json(), "index": index}, "weight": weight.to_json()},
        )
    return gm


def specs(recipe: Recipe) -> tuple[QuantSpec, QuantSpec]:
    """Activation and weight spec of a layer."""
    activation = QuantSpec(
        recipe.activation_bits,
        recipe.activation_symmetric,
        None,
        recipe.activation_observer,
        learned=True,
    )
    weight = QuantSpec(recipe.weight_bits, True, 0, recipe.weight_observer)
    return activation, weight


def reason_to_stay_float(layer: Node, recipe: Recipe) -> str | None:
    """A sentence, or None for a layer that is quantised."""
    path = module_path(layer)
    for pattern in recipe.keep_float:
        if fnmatch(path, pattern):
            return f"recipe keeps {pattern} float"
    weight = layer.args[1]
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return "its weight is computed, not a parameter"
    if str(weight.target).startswith(CONSTANTS):
        return "its weight is a fixed filter, not a parameter"
    if argument(layer, 6, "groups", 1) != 1:
        return "grouped convolutions have no integer kernel"
    return None
