"""What a module keeps from call to call: buffers and attributes that its forward sets."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


@contextmanager
def kept(model: nn.Module) -> Iterator[list[str]]:
    """Within, the model may be run; then its buffers and attributes are what they were.

    Yields a list in which there is afterwards what forward had set: `self.n (toy.py:9: self.n = 1)`
    """
    before = [(module, _attributes(module)) for module in model.modules()]
    values = {id(b): (b, b.clone(), b._version) for b in model.buffers() if not b.is_inference()}
    changes: list[str] = []
    try:
        yield changes
    finally:
        for module, attributes in before:
            now = _attributes(module)
            for key, value in attributes.items():
                is_set = now.get(key, _ABSENT) is not value
                if is_set or (id(value) in values and values[id(value)][2] != value._version):
                    changes.append(f"self.{key}{_place(module, key)}")
                if is_set:
                    (module._buffers if key in module._buffers else module.__dict__)[key] = value
        with torch.no_grad():
            for buffer, value, version in values.values():
                if buffer._version != version:
                    buffer.copy_(value)


def place_of_forward(model: nn.Module) -> str:
    """`toy.py:9`, where forward begins; "" if it is not written in Python."""
    code = getattr(type(model).forward, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else ""


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}
    return own | {k: v for k, v in module._buffers.items() if isinstance(v, Tensor)}


def _place(module: nn.Module, key: str) -> str:
    """` (toy.py:9 in forward: self.n = self.n + 1)`, where the attribute is set; "" if unknown."""
    sets = re.compile(rf"\bself\.{re.escape(key)}\b(\[.*\])?\s*([^\s=\w]*=(?!=)|\.\w+_\()")
    for kind in type(module).__mro__:
        for name, method in vars(kind).items():
            if name == "__init__" or not isinstance(method, FunctionType):
                continue
            for number, text in _lines(method):
                if sets.search(text):
                    file = Path(method.__code__.co_filename).name
                    return f" ({file}:{number} in {name}: {text.strip()})"
    return ""


def _lines(method: FunctionType) -> Iterator[tuple[int, str]]:
    """The numbers and texts of the lines of a function."""
    for number in sorted({line for _, _, line in method.__code__.co_lines() if line}):
        yield number, linecache.getline(method.__code__.co_filename, number)
