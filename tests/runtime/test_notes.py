"""Notes of nodes: what a pass invents is kept, what readers rely on is checked."""

from __future__ import annotations

from typing import Any

import pytest
from torch.fx import Graph, Node

from fxquant.errors import ArtifactError
from fxquant.graph.nodes import write_note
from fxquant.runtime.fields import Field
from fxquant.runtime.notes import read_notes, written_notes


def noted(**notes: Any) -> Node:
    node = Graph().placeholder("x")
    write_note(node, **notes)
    return node


def test_unknown_notes_survive() -> None:
    notes = {
        "quant": {"float": "a reason", "unplanned": True, "later": {"bits": [1, None]}},
        "stack": [["a", "B"]],
        "invented": [1.5, "two", {"three": False}],
    }
    assert read_notes(Field(written_notes(noted(**notes)), "graph.json")) == notes


@pytest.mark.parametrize("value", [{1: 2}, object(), float("nan"), {"a": {1, 2}}, 1j])
def test_what_is_not_plain_is_named(value: Any) -> None:
    with pytest.raises(ArtifactError, match="%x has a note without a saved form: 'odd'"):
        written_notes(noted(odd=value))


@pytest.mark.parametrize(
    "notes",
    [
        {"quant": {"unplanned": "yes"}},
        {"quant": {"float": 3}},
        {"quant": {"weight": {"bits": 99}}},
        {"quant": []},
        {"stack": ["a"]},
        {"unit": ["a"]},
        {"timestep_only": 1},
        {"source": "not a name"},
        {"__class__": 1},
        {"new": [[[[[[[[1]]]]]]]]},
        {f"n{k}": k for k in range(99)},
    ],
)
def test_notes_that_readers_would_trip_over_are_refused(notes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"graph\.json"):
        read_notes(Field(notes, "graph.json"))
