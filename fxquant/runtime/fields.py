"""JSON from outside, read field by field: every look checks, and every complaint says where.

A saved model is data that anybody may have edited. Nothing of it is used before its type, its
size and its range were checked here; what does not fit is an ArtifactError such as
`graph.json: nodes[12].args[3]: expected an integer from 0 to 17, not "0"`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any, NoReturn

from fxquant.errors import ArtifactError

TEXT_LIMIT = 4096
COUNT_LIMIT = 1 << 17
WHOLE = 2**63  # integers lie in [-WHOLE, WHOLE)


class Field:
    """One JSON value and where it stands: `file: path`."""

    __slots__ = ("file", "path", "value")

    def __init__(self, value: Any, file: str, path: str = ""):
        self.value = value
        self.file = file
        self.path = path

    def fail(self, complaint: str) -> NoReturn:
        """Raise the ArtifactError that names this field."""
        raise ArtifactError(f"{self.file}: {self.path + ': ' if self.path else ''}{complaint}")

    def record(self, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Field]:
        """The members of an object that has these keys and no others."""
        members = self.members()
        for key in required:
            if key not in members:
                self.fail(f"lacks {key!r}")
        for key in members:
            if key not in required and key not in optional:
                self.fail(f"has an unknown key {shown(key)}")
        return members

    def members(self, limit: int = COUNT_LIMIT) -> dict[str, Field]:
        """The members of an object with any keys."""
        value = self._of(dict, "an object")
        if len(value) > limit:
            self.fail(f"has {len(value)} entries, {limit} are allowed")
        return {
            key: Field(v, self.file, f"{self.path}.{key}" if self.path else key)
            for key, v in value.items()
        }

    def items(self, limit: int = COUNT_LIMIT, count: int | None = None) -> list[Field]:
        """The items of a list, of exactly `count` if given."""
        value = self._of(list, "a list")
        if len(value) > limit or (count is not None and len(value) != count):
            wanted = f"{count} are" if count is not None else f"at most {limit} are"
            self.fail(f"has {len(value)} items, {wanted} expected")
        return [Field(v, self.file, f"{self.path}[{i}]") for i, v in enumerate(value)]

    def text(self, pattern: re.Pattern[str] | None = None, limit: int = TEXT_LIMIT) -> str:
        """A string that matches all of `pattern`."""
        value: str = self._of(str, "a string")
        if len(value) > limit:
            self.fail(f"is {len(value)} characters long, {limit} are allowed")
        if pattern is not None and not pattern.fullmatch(value):
            self.fail(f"{shown(value)} is not of the form {pattern.pattern}")
        return value

    def one_of(self, known: Collection[str]) -> str:
        """A string out of a few."""
        value = self.text()
        if value not in known:
            self.fail(f"{shown(value)} is not one of {', '.join(sorted(known)[:12])}")
        return value

    def integer(self, low: int = -WHOLE, high: int = WHOLE - 1) -> int:
        """An integer in [low, high]."""
        if type(self.value) is not int or not low <= self.value <= high:
            self.fail(f"expected an integer from {low} to {high}, not {shown(self.value)}")
        return self.value

    def number(self) -> float:
        """A finite integer or float."""
        if type(self.value) not in (int, float) or not -1e300 < self.value < 1e300:
            self.fail(f"expected a finite number, not {shown(self.value)}")
        return self.value

    def boolean(self) -> bool:
        return bool(self._of(bool, "true or false"))

    def plain(self, depth: int = 6) -> Any:
        """Any JSON value of bounded depth and sizes."""
        value = self.value
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self.text()
        if isinstance(value, (int, float)):
            return self.number()
        if depth == 0:
            self.fail("is nested too deeply")
        if isinstance(value, list):
            return [item.plain(depth - 1) for item in self.items(4096)]
        return {key: member.plain(depth - 1) for key, member in self.members(4096).items()}

    def _of(self, kind: type, name: str) -> Any:
        if type(self.value) is not kind:
            self.fail(f"expected {name}, not {shown(self.value)}")
        return self.value


def parse(data: bytes, file: str) -> Field:
    """JSON text in UTF-8.

    Raises:
        ArtifactError: not JSON, a key given twice, NaN or infinity, numbers or nesting beyond
            what Python reads.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("a key is given twice")
        return members

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not readable as JSON: {error}") from error
    return Field(value, file)


def shown(value: Any) -> str:
    """A value for a message, short."""
    if isinstance(value, (dict, list)):
        return f"a{'n object' if isinstance(value, dict) else ' list'} of {len(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number out of range"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
