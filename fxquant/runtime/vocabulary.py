"""What a saved graph may say about arguments, and how they are written as JSON.

Numbers, strings, null and lists are themselves; what JSON lacks is an object of one member:
{"node": name}, {"tensor": target}, {"dtype": "uint8"}, {"layout": "strided"}, {"device": "cpu"},
{"float": "-inf"}, {"complex": [re, im]}, {"slice": [start, stop, step]}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxquant.errors import ArtifactError
from fxquant.graph.nodes import is_symbolic
from fxquant.runtime.fields import Field

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
        torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
        torch.uint16, torch.uint32, torch.uint64,
        torch.complex32, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_LAYOUTS: dict[str, Any] = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.contiguous_format, torch.channels_last, torch.channels_last_3d,
        torch.preserve_format, torch.strided,
    )
}  # fmt: skip
_DEPTH = 8  # of lists in arguments
_MOST_ITEMS = 1 << 16
_LONGEST = 1024  # of strings


def encoded(value: Any) -> Any:
    """An argument as JSON.

    Raises:
        ArtifactError: a kind of value that the format does not have.
    """
    if isinstance(value, Node):
        kind, name = (
            ("tensor", str(value.target)) if value.op == "get_attr" else ("node", value.name)
        )
        return {kind: name}
    if isinstance(value, (list, tuple)):
        return [encoded(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(value)}
    if value is None or type(value) in (bool, int, str):
        return value
    return _encoded_constant(value)


def _encoded_constant(value: Any) -> dict[str, Any]:
    if isinstance(value, complex):
        return {"complex": [encoded(value.real), encoded(value.imag)]}
    if isinstance(value, slice):
        return {"slice": [encoded(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        name = str(value).removeprefix("torch.")
        if name in DTYPES:
            return {"dtype": name}
    if isinstance(value, (torch.memory_format, torch.layout)):
        name = str(value).removeprefix("torch.")
        if name in _LAYOUTS:
            return {"layout": name}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # where it runs is settled when it is loaded
    raise ArtifactError(f"the saved form has no {type(value).__name__} arguments ({value!r})")


def decoded(field: Field, reference: Callable[[str, Field], Node], depth: int = _DEPTH) -> Any:
    """Inverse of `encoded`.

    Args:
        reference: the node for a {"node": ...} or {"tensor": ...}; raises for an unknown one.
    """
    value = field.value
    if value is None or type(value) is bool:
        return value
    if type(value) is int:
        return field.integer()
    if type(value) is float:
        return _finite(field)
    if type(value) is str:
        return field.text(limit=_LONGEST)
    if type(value) is list:
        if depth == 0:
            field.fail("is nested too deeply")
        return [decoded(item, reference, depth - 1) for item in field.items(_MOST_ITEMS)]
    ((kind, member),) = _single(field)
    if kind in ("node", "tensor"):
        return reference(kind, member)
    if kind == "slice":
        if depth == 0:
            field.fail("is nested too deeply")
        return slice(*(decoded(item, reference, 0) for item in member.items(count=3)))
    return _constant(kind, member)


def _finite(field: Field) -> float:
    if not math.isfinite(field.value):
        field.fail("is a number out of range")
    return float(field.value)


def _single(field: Field) -> list[tuple[str, Field]]:
    members = list(field.members(limit=1).items())
    if not members:
        field.fail("is an empty object")
    return members


def _constant(kind: str, field: Field) -> Any:
    if kind == "float":
        return float(field.one_of(("inf", "-inf", "nan")))
    if kind == "complex":
        real, imaginary = (_real(part) for part in field.items(count=2))
        return complex(real, imaginary)
    if kind == "dtype":
        return DTYPES[field.one_of(DTYPES)]
    if kind == "layout":
        return _LAYOUTS[field.one_of(_LAYOUTS)]
    if kind != "device":
        field.fail(f"unknown kind of argument {kind!r}")
    return torch.device(field.one_of(("cpu",)))


def _real(field: Field) -> float:
    if isinstance(field.value, dict):
        ((kind, member),) = _single(field)
        if kind != "float":
            field.fail("is no number")
        return float(member.one_of(("inf", "-inf", "nan")))
    return float(field.number())


def is_size(value: Any) -> bool:
    """May it be computed with: a number, or a node that is one?"""
    if isinstance(value, Node):
        return is_symbolic(value)
    return type(value) in (int, float, bool)
