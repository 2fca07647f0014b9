"""Nested arguments and results: what is a tensor in them, what stays as it is, and how they nest.

`{"text_embeds": e, "image_embeds": [i], "scale": 0.5}` as the argument `added` has the tensors
`added.text_embeds` and `added.image_embeds.0`, the constant `added.scale`, and the skeleton
`Skeleton("dict", {"text_embeds": "added.text_embeds", ...})` from which it is built again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.errors import CallError

_DEVICE = re.compile(r"(cpu|cuda|meta)(:[0-9]{1,3})?")
SAMPLES = "samples"  # the kind of a list with one entry for all samples: see `per_sample`
CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Skeleton:
    """A container: its kind, and by key the skeletons and the leaves' names in it.

    Attributes:
        kind: "dict", "list", "tuple" or SAMPLES; keys of the sequences are 0, 1, ...
        members: pairs of key and Skeleton, or name of a leaf.
    """

    kind: str
    members: tuple[tuple[Any, Skeleton | str], ...]


def taken_apart(name: str, value: Any) -> tuple[Skeleton | str, dict[str, Any]]:
    """The skeleton of a value (or the name, of a leaf) and its leaves by name.

    Dictionaries of any kind count as dict, sequences as list or tuple; numpy's arrays and numbers
    become tensors and Python's numbers.

    Raises:
        CallError: a leaf that is no tensor, number, string, dtype, device or None.
    """
    if isinstance(value, Mapping):
        return _container("dict", name, value.items())
    if isinstance(value, list):
        return _container("list", name, enumerate(value))
    if isinstance(value, tuple):
        return _container("tuple", name, enumerate(value))
    return name, {name: _leaf(name, value)}


def put_together(skeleton: Skeleton | str, leaves: Mapping[str, Any]) -> Any:
    """Inverse of `taken_apart`; containers are new ones, which the callee may change."""
    if isinstance(skeleton, str):
        return leaves[skeleton]
    members = {key: put_together(member, leaves) for key, member in skeleton.members}
    if skeleton.kind == "dict":
        return members
    return tuple(members.values()) if skeleton.kind == "tuple" else list(members.values())


def names_in(skeleton: Skeleton | str) -> Iterator[str]:
    """The leaves' names, in order."""
    if isinstance(skeleton, str):
        yield skeleton
    else:
        for _, member in skeleton.members:
            yield from names_in(member)


def renamed(skeleton: Skeleton | str, names: Mapping[str, str]) -> Skeleton | str:
    """The same nesting of leaves with other names."""
    if isinstance(skeleton, str):
        return names[skeleton]
    members = tuple((key, renamed(member, names)) for key, member in skeleton.members)
    return Skeleton(skeleton.kind, members)


def nested_by_names(names: Iterable[str]) -> Skeleton:
    """The nesting that dotted names imply: members of dicts by name, of tuples by number."""
    groups: dict[str, dict[str, str]] = {}
    members: list[tuple[Any, Skeleton | str]] = []
    for name in names:
        head, _, key = name.partition(".")
        if not key:
            members.append((name, name))
        groups.setdefault(head, {})[key] = name
    for head, inside in groups.items():
        if "" not in inside:
            kind = "tuple" if all(key.isdigit() for key in inside) else "dict"
            keys = sorted(inside, key=int) if kind == "tuple" else list(inside)
            members.append((head, Skeleton(kind, tuple((key, inside[key]) for key in keys))))
    return Skeleton("dict", tuple(members))


def to_json(skeleton: Skeleton | str) -> Any:
    """Lists and strings: `["dict", [["text_embeds", "added.text_embeds"]]]`."""
    if isinstance(skeleton, str):
        return skeleton
    return [skeleton.kind, [[key, to_json(member)] for key, member in skeleton.members]]


def from_json(value: Any) -> Skeleton | str:
    """Inverse of `to_json`.

    Raises:
        ValueError: that is no skeleton.
    """
    match value:
        case str():
            return value
        case ["dict" | "list" | "tuple" | "samples" as kind, [*members]] if all(
            map(_is_member, members)
        ):
            found = Skeleton(kind, tuple((key, from_json(member)) for key, member in members))
            if kind != SAMPLES or [key for key, _ in found.members] == [0]:
                return found
    raise ValueError(f"{value!r} is no skeleton of arguments")


def _is_member(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) in (str, int)


def _container(kind: str, name: str, items: Any) -> tuple[Skeleton, dict[str, Any]]:
    members: list[tuple[Any, Skeleton | str]] = []
    leaves: dict[str, Any] = {}
    for key, item in items:
        if type(key) not in (str, int):
            raise CallError(f"{name} has the key {key!r}; keys are strings or integers")
        skeleton, found = taken_apart(f"{name}.{key}", item)
        members.append((key, skeleton))
        leaves |= found
    return Skeleton(kind, tuple(members)), leaves


def _leaf(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.tensor(value)  # a copy: the array may not be writable
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, *CONSTANTS)):
        return value
    raise CallError(
        f"argument {name!r} is a {type(value).__name__}; a compiled model takes tensors, numbers, "
        "strings and None, alone or in dicts, lists and tuples. Leave it out, or set it up inside "
        "the module before compiling"
    )


@dataclass(frozen=True)
class FlatCall:
    """A call's arguments by name, taken apart.

    Attributes:
        skeleton: how they nest.
        tensors, constants: the leaves, by name.
    """

    skeleton: Skeleton
    tensors: dict[str, Tensor]
    constants: dict[str, Any]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> FlatCall:
        """Arguments of forward by name; raises CallError for what cannot be one."""
        members: list[tuple[Any, Skeleton | str]] = []
        leaves: dict[str, Any] = {}
        for name, value in arguments.items():
            skeleton, found = taken_apart(name.lstrip("*"), value)
            members.append((name, skeleton))
            leaves |= found
        tensors = {n: v for n, v in leaves.items() if isinstance(v, Tensor)}
        constants = {n: v for n, v in leaves.items() if n not in tensors}
        return cls(Skeleton("dict", tuple(members)), tensors, constants)

    @property
    def leaves(self) -> dict[str, Any]:
        """Tensors and constants, in the order of the skeleton."""
        found = {**self.tensors, **self.constants}
        return {name: found[name] for name in names_in(self.skeleton)}

    def arguments(self) -> dict[str, Any]:
        """Inverse of `of`."""
        given: dict[str, Any] = put_together(self.skeleton, self.leaves)
        return given


def constant_to_json(value: Any) -> Any:
    """A constant leaf as JSON has it: itself, or {"dtype": "float32"} and the like.

    Numbers that JSON lacks are written as {"float": "inf"}.
    """
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def constant_from_json(value: Any) -> Any:
    """Inverse of `constant_to_json`.

    Raises:
        ValueError: that is no constant.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case {"dtype": str(name)} if isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        case {"device": str(name)} if _DEVICE.fullmatch(name):
            return torch.device(name)
        case {"complex": str(text)}:
            return complex(text)
        case {"float": "inf" | "-inf" | "nan" as text}:
            return float(text)
    raise ValueError(f"{value!r} is no constant argument")
