"""Lists that say the same of every sample, as `img_shapes=[(1, 8, 8)] * batch` does.

Their length is the batch and no part of the program: a signature keeps one entry, in a skeleton of
the kind SAMPLES, and a call may have as many as it has samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import CallError
from fxquant.graph.structure import SAMPLES, Skeleton, names_in, put_together


def batch_of(first: Tensor) -> int:
    """How many samples a call has, by its first tensor."""
    return first.shape[0] if first.ndim else 1


def without_repeats(skeleton: Skeleton, constants: Mapping[str, Any], batch: int) -> Skeleton:
    """The skeleton of a call in which such lists have one entry.

    Args:
        constants: the leaves that are no tensors.
        batch: of the call. A list of one entry may be anything and stays what it is.
    """
    if skeleton.kind == "list" and len(skeleton.members) == batch > 1:
        entries = [_entry(member, constants) for _, member in skeleton.members]
        if entries[0] is not None and all(entry == entries[0] for entry in entries):
            return Skeleton(SAMPLES, skeleton.members[:1])
    members = [
        (key, without_repeats(member, constants, batch) if isinstance(member, Skeleton) else member)
        for key, member in skeleton.members
    ]
    return Skeleton(skeleton.kind, tuple(members))


def _entry(member: Skeleton | str, constants: Mapping[str, Any]) -> tuple[object, ...] | None:
    """What can be compared with other entries, as types are: True is not 1. None for tensors and
    for nothing."""
    names = list(names_in(member))
    if not names or any(name not in constants for name in names):
        return None
    value = put_together(member, constants)
    return type(value), value, *(type(constants[name]) for name in names)


def shortened(skeleton: Skeleton, leaves: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """A call's leaves with one entry of every such list.

    Raises:
        CallError: a list has another length than the batch, or different entries.
    """
    found = dict(leaves)
    for path in _paths(skeleton):
        entries: dict[str, dict[str, Any]] = {}
        for name in [n for n in found if n.startswith(f"{path}.")]:
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            entries.setdefault(index, {})[rest] = found[name]
            if index != "0":
                del found[name]
        if len(entries) != batch:
            raise CallError(
                f"{path} has {len(entries)} entries for a batch of {batch}; it had one for each "
                "sample in the first calibration call"
            )
        other = next((i for i, entry in entries.items() if entry != entries.get("0")), None)
        if other is not None:
            raise CallError(
                f"{path}.{other} is another than {path}.0; they were the same for all samples in "
                "the first calibration call. Call the compiled model once for each kind of sample"
            )
    return found


def repeated(skeleton: Skeleton | str, value: Any, first: Tensor) -> Any:
    """Arguments put together from such leaves, with the entries of all samples.

    Args:
        first: the call's first tensor, which says how many samples there are.
    """
    if isinstance(skeleton, str):
        return value
    if skeleton.kind == SAMPLES:
        batch: int | torch.SymInt = batch_of(first)
        count = batch if isinstance(batch, int) else int(batch.node.hint)
        return [copy.deepcopy(value[0]) for _ in range(count)]
    items = value if isinstance(value, dict) else dict(enumerate(value))
    members = {k: repeated(member, items[k], first) for k, member in skeleton.members}
    if isinstance(value, dict):
        return members
    return type(value)(members.values())


def _paths(skeleton: Skeleton | str, path: str = "") -> Iterator[str]:
    """Dotted names of the lists."""
    if isinstance(skeleton, str):
        return
    if skeleton.kind == SAMPLES:
        yield path
    else:
        for key, member in skeleton.members:
            name = f"{path}.{key}" if path else str(key).lstrip("*")
            yield from _paths(member, name)
