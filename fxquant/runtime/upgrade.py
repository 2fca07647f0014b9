"""Graphs of earlier formats in the words of today's.

A step a format: what changed, and how an older graph says it. A graph is edited as the plain data
that it was read as, before anything of it is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxquant.runtime.fields import Field


def upgraded(document: Field, format_: int) -> Field:
    """The graph of a saved model whose manifest has that format number."""
    value = document.value
    for step in _STEPS[format_ - 1 :]:
        value = step(value)
    return Field(value, document.file, document.path)


def _attention_takes_quantisers(document: Any) -> Any:
    """Format 2: attention also multiplies and writes integers; before, it was float alone."""
    if not isinstance(document, dict) or not isinstance(document.get("nodes"), list):
        return document  # refused later, with the field's name
    return {**document, "nodes": [_with_quantisers(node) for node in document["nodes"]]}


def _with_quantisers(node: Any) -> Any:
    if not isinstance(node, dict) or node.get("op") != "fxquant.attention.default":
        return node
    args = node.get("args")
    if not isinstance(args, list) or len(args) != 6:
        return node
    q, k, v, mask, scale, kernel = args
    quantisers = [{"node": "row"}, -1, -1, -1]
    out = [-1, 8, {"dtype": "float32"}]
    return {**node, "args": [q, k, v, *quantisers, mask, scale, *out, kernel]}


def _facts_and_outputs(document: Any) -> Any:
    """Format 3: what is true of sizes is said (before, multiples of symbols said it), and a graph
    may return several tensors."""
    if not isinstance(document, dict) or "output" not in document:
        return document
    rest = {name: value for name, value in document.items() if name != "output"}
    return {**rest, "facts": [], "outputs": [document["output"]]}


_STEPS: tuple[Callable[[Any], Any], ...] = (_attention_takes_quantisers, _facts_and_outputs)
