"""Notes of nodes in a saved model: plain values, those that are read by name checked by kind.

A pass may invent a note: whatever JSON can hold is kept. What a reader takes for granted belongs
into `_CHECKS`, so that a file cannot say something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from fxquant.errors import ArtifactError, FxquantError
from fxquant.quant.spec import QuantSpec
from fxquant.runtime.fields import Field

NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")
_EDGES = ("input", "weight", "q", "k", "v")  # of layers and of attention, each with its spec
_MOST = 64


def written_notes(node: Node) -> dict[str, Any]:
    """A node's notes as JSON.

    Raises:
        ArtifactError: one that is not plain.
    """
    notes: dict[str, Any] = node.meta.get("custom", {}).get("fxquant", {})
    for key, value in notes.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == _listed(value)
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same or not _KEY.fullmatch(key):
            raise ArtifactError(f"node %{node.name} has a note without a saved form: {key!r}")
    return dict(sorted(notes.items(), key=lambda item: _order(item[0])))


def _listed(value: Any) -> Any:
    """Tuples as lists, which they come back as."""
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    return {k: _listed(v) for k, v in value.items()} if isinstance(value, dict) else value


def _order(key: str) -> tuple[int, str]:
    known = list(_CHECKS)
    return (known.index(key), "") if key in known else (len(known), key)


def read_notes(field: Field) -> dict[str, Any]:
    """Inverse of `written_notes`."""
    return {key: _read(_CHECKS, key, member) for key, member in field.members(_MOST).items()}


def _read(checks: dict[str, Callable[[Field], Any]], key: str, field: Field) -> Any:
    if not _KEY.fullmatch(key):
        field.fail("is no name of a note")
    return checks[key](field) if key in checks else field.plain()


def _pair(field: Field) -> list[str]:
    return [item.text() for item in field.items(count=2)]


def _quant(field: Field) -> dict[str, Any]:
    """{"input": spec, "weight": spec}, {"q": spec, "k": spec, "v": spec} or {"float": reason}, and
    what passes add to them."""
    return {key: _read(_QUANT, key, member) for key, member in field.members(_MOST).items()}


def _spec(field: Field) -> dict[str, Any]:
    entry = field.record(("bits",), (*QuantSpec.__dataclass_fields__, "index"))
    entry["bits"].integer(2, 16)
    spec: dict[str, Any] = {key: member.plain(0) for key, member in entry.items()}
    try:
        QuantSpec.from_json(spec)
    except FxquantError as error:
        field.fail(str(error))
    return spec


_QUANT: dict[str, Callable[[Field], Any]] = {
    **dict.fromkeys(_EDGES, _spec),
    "float": lambda field: field.text(),
    "unplanned": lambda field: field.boolean(),
}
_CHECKS: dict[str, Callable[[Field], Any]] = {
    "stack": lambda field: [_pair(item) for item in field.items(64)],
    "timestep_only": lambda field: field.boolean(),
    "quant": _quant,
    "unit": _pair,
    "source": lambda field: field.text(NODE_NAME),
}
