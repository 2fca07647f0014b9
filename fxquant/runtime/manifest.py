"""fxquant.json: what a saved model is, and the checksums of its files.

Format: one integer, FORMAT. A release reads its own format and every earlier one; anything that an
older release would misread, even by ignoring it, raises the number, and a newer format is refused
with the advice to upgrade.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from fxquant._version import __version__
from fxquant.errors import ArtifactError, RecipeError
from fxquant.graph import size_expressions
from fxquant.graph.limits import Guard, Limits, limits_of
from fxquant.graph.signature import NOTHING, RESULT, TIMESTEP, Input, Signature
from fxquant.graph.structure import (
    Skeleton,
    constant_from_json,
    constant_to_json,
    from_json,
    names_in,
    nested_by_names,
    to_json,
)
from fxquant.recipe import Recipe
from fxquant.runtime.document import Blueprint, Document
from fxquant.runtime.fields import Field
from fxquant.runtime.folder import FILE, MANIFEST, Written
from fxquant.runtime.vocabulary import DTYPES

if TYPE_CHECKING:
    from fxquant.runtime.model import QuantizedModel

FORMAT = 3
_KEYS = (
    "format", "checksum", "model", "graph", "versions", "recipe", "signature", "original",
    "calibration", "summary",
)  # fmt: skip
_HASH = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_PARAMETER = re.compile(r"\*{0,2}[A-Za-z_][A-Za-z0-9_]{0,99}")
_INPUT = re.compile(r"[A-Za-z_]\w{0,99}(?:\.\w{1,100}){0,4}", re.ASCII)
_CLASS = re.compile(
    r"(diffusers\.models(?:\.[a-z_][a-z0-9_]{0,60}){0,6})\.([A-Z][A-Za-z0-9_]{0,99})"
)
_MOST_INPUTS = 1024
_DEEPEST = 40  # lists in the nesting of arguments: two for each container
log = logging.getLogger(__name__)

_UNSAVED = ("_name_or_path", "_use_default_values")  # config entries about a machine, or unordered


@dataclass(frozen=True)
class Origin:
    """What a model remembers for being saved.

    Attributes:
        document: its graph as data, None if the format cannot say it.
        problem: then the reason.
        original: "module.Class" of a diffusers model that was compiled, None for another.
        calls: number of calibration calls.
        timesteps: the distinct timesteps in them, ascending.
    """

    document: Document | None
    problem: str
    original: str | None
    calls: int
    timesteps: tuple[float, ...]


def class_path(kind: type) -> str | None:
    """How a saved model names the class it came from: diffusers' own models only."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return path if _CLASS.fullmatch(path) else None


def to_bytes(model: QuantizedModel, origin: Origin, tensors: Written, graph: Written) -> bytes:
    """The manifest of a model whose other files were written."""
    summary = model.summary
    content = {
        "format": FORMAT,
        "model": tensors.__dict__,
        "graph": graph.__dict__,
        "versions": {
            "fxquant": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "recipe": model.recipe.to_json(),
        "signature": _signature(model.signature),
        "original": {"class": origin.original, "config": _plain_config(model.config)},
        "calibration": {"calls": origin.calls, "timesteps": list(origin.timesteps)},
        "summary": {
            "precision": dict(summary.precision),
            "stayed_float": {k: list(v) for k, v in summary.stayed_float.items()},
            "bytes_before": summary.bytes_before,
        },
    }
    content["checksum"] = _checksum(content)
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    """Of everything in fxquant.json but itself."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _signature(signature: Signature) -> dict[str, Any]:
    return {
        "parameters": list(signature.parameters),
        "inputs": [[i.name, i.rank, _dtype_name(i.dtype)] for i in signature.inputs],
        "dtype": _dtype_name(signature.dtype),
        "arguments": to_json(signature.arguments),
        "constants": _constants(signature.constants),
        "defaults": _constants(signature.defaults),
        "timestep": signature.timestep,
        "result": to_json(signature.result),
        "shapes": [list(shape) for shape in signature.limits.shapes],
        "guards": [[guard.text, guard.place] for guard in signature.limits.guards],
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _constants(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: constant_to_json(value) for name, value in values.items()}


def _plain_config(config: Any) -> dict[str, Any] | None:
    """The entries of a config that JSON has; a warning names the others."""
    if config is None:
        return None
    entries = config if isinstance(config, Mapping) else vars(config)
    kept, lost = dict[str, Any](), list[str]()
    for key, value in entries.items():
        if key in _UNSAVED:
            continue
        try:
            kept[_setting(key)] = Field(json.loads(json.dumps(value)), MANIFEST, key).plain()
        except (TypeError, ValueError, RecursionError, ArtifactError):
            lost.append(f"{key!r} ({type(value).__name__})")
    if lost:
        log.warning(
            "the config's %s cannot be saved, as JSON has no such thing: the loaded model's config "
            "lacks it",
            ", ".join(lost),
        )
    return kept


def _setting(key: object) -> str:
    """Raises TypeError for what is not the name of a setting."""
    if not isinstance(key, str) or not _WORD.fullmatch(key):
        raise TypeError(f"{key!r} is no name")
    return key


def verified(whole: Field) -> dict[str, Field]:
    """The parts of a manifest whose format we read and whose checksum fits.

    Raises:
        ArtifactError: not a manifest, a newer format, or damaged.
    """
    members = whole.members(64)
    if "format" not in members:
        whole.fail("lacks 'format'; it is not a saved model of fxquant")
    if members["format"].integer(1) > FORMAT:
        members["format"].fail(
            f"is {members['format'].value}, this fxquant {__version__} reads up to {FORMAT}; "
            "pip install -U fxquant"
        )
    whole.record(_KEYS)
    if members["checksum"].text(_HASH) != _checksum(whole.value):
        whole.fail("does not match its checksum; the file was changed or damaged. Save again")
    for name, version in members["versions"].members(16).items():
        version.text(limit=100)
        if not _WORD.fullmatch(name):
            version.fail("is no package")
    return members


def described(entry: Field, kind: str) -> Written:
    """What the manifest says about one of the other files."""
    members = entry.record(("name", "bytes", "sha256"))
    written = Written(
        members["name"].text(FILE),
        members["bytes"].integer(1, 1 << 50),
        members["sha256"].text(_HASH),
    )
    if not written.name.startswith(f"{kind}-{written.sha256[:16]}."):
        members["name"].fail("is not the name that goes with the checksum")
    return written


def read_signature(field: Field, blueprint: Blueprint) -> Signature:
    """The signature, which must fit the graph's inputs: by position, since the names of a graph's
    nodes are FX's to choose (`input` is a builtin and becomes `input_1`)."""
    members = field.members(16)
    read = _read_signature if "inputs" in members else _read_signature_2
    signature = read(field, blueprint)
    if not signature.dtype.is_floating_point:
        members["dtype"].fail("is no float")
    ranks = [rank for _, rank in blueprint.inputs]
    if not signature.inputs or list(signature.ranks) != ranks:
        field.fail(f"has inputs of ranks {list(signature.ranks)}, the graph of {ranks}")
    for name, (node, _) in zip(signature.names, blueprint.inputs, strict=True):
        if (name == signature.timestep) != (node == TIMESTEP):
            field.fail(f"has {name!r} where the graph has {node!r}")
    given = dict(signature.arguments.members)
    for name in given:
        known = name in signature.parameters
        if not known and not any(p.startswith("**") for p in signature.parameters):
            field.fail(f"argument {name!r} belongs to no parameter")
    leaves = set(names_in(signature.arguments))
    if leaves != {*signature.names, *signature.constants}:
        field.fail("has arguments that are neither inputs nor constants")
    return signature


def _read_signature(field: Field, blueprint: Blueprint) -> Signature:
    entry = field.record(
        ("parameters", "inputs", "dtype", "arguments", "constants", "defaults", "timestep",
         "result", "shapes", "guards")
    )  # fmt: skip
    inputs = tuple(_read_input(item) for item in entry["inputs"].items(_MOST_INPUTS))
    timestep = entry["timestep"]
    if timestep.value is not None:
        timestep.one_of([i.name for i in inputs])
    arguments = _read_skeleton(entry["arguments"])
    if isinstance(arguments, str) or arguments.kind != "dict":
        entry["arguments"].fail("is no dict of arguments")
    result = _read_skeleton(entry["result"])
    returned = [name for name in names_in(result) if name != NOTHING]
    if len(returned) != blueprint.outputs or len({*returned}) != len(returned):
        entry["result"].fail("does not hold what the graph returns")
    return Signature(
        parameters=tuple(p.text(_PARAMETER) for p in entry["parameters"].items(256)),
        inputs=inputs,
        dtype=DTYPES[entry["dtype"].one_of(DTYPES)],
        arguments=arguments,
        constants=_read_constants(entry["constants"]),
        defaults=_read_constants(entry["defaults"]),
        timestep=timestep.value,
        result=result,
        limits=_read_limits(entry["shapes"], entry["guards"], inputs),
    )


def _read_input(field: Field) -> Input:
    name, rank, dtype = field.items(count=3)
    return Input(name.text(_INPUT), rank.integer(0, 8), DTYPES[dtype.one_of(DTYPES)])


def _read_skeleton(field: Field) -> Skeleton | str:
    try:
        return from_json(field.plain(_DEEPEST))
    except ValueError as error:
        field.fail(str(error)[:200])


def _read_constants(field: Field) -> dict[str, Any]:
    found = {}
    for name, member in field.members(_MOST_INPUTS).items():
        try:
            found[name] = constant_from_json(member.plain())
        except ValueError as error:
            member.fail(str(error)[:200])
    return found


def _read_limits(shapes: Field, guards: Field, inputs: Sequence[Input]) -> Limits:
    dimensions = []
    for shape, given in zip(shapes.items(count=len(inputs)), inputs, strict=True):
        sizes = shape.items(count=given.rank)
        dimensions.append([_read_size(size) for size in sizes])
    found = []
    for guard in guards.items(4096):
        text, place = guard.items(count=2)
        found.append(Guard(_read_expression(text), place.text(limit=1000)))
    return Limits(dimensions, found)


def _read_size(field: Field) -> int | str:
    return field.integer(0, 2**31 - 1) if type(field.value) is int else _read_expression(field)


def _read_expression(field: Field) -> str:
    text = field.text(limit=1 << 14)
    try:
        size_expressions.parse(text)
    except ValueError as error:
        field.fail(str(error)[:300])
    return text


def _read_signature_2(field: Field, blueprint: Blueprint) -> Signature:
    """Of formats 1 and 2: nesting is implied by dotted names, sizes are those of the graph, and
    what is returned is a tuple of one tensor."""
    entry = field.record(("parameters", "names", "ranks", "dtype", "integer_timestep"))
    names = tuple(n.text(_INPUT) for n in entry["names"].items(_MOST_INPUTS))
    entry["integer_timestep"].boolean()
    ranks = [r.integer(0, 8) for r in entry["ranks"].items(count=len(names))]
    examples = blueprint.examples
    if [example.ndim for example in examples] != ranks:
        field.fail(f"has inputs of ranks {ranks}, the graph has others")
    return Signature(
        parameters=tuple(p.text(_WORD) for p in entry["parameters"].items(256)),
        inputs=tuple(Input(n, e.ndim, e.dtype) for n, e in zip(names, examples, strict=True)),
        dtype=DTYPES[entry["dtype"].one_of(DTYPES)],
        arguments=nested_by_names(names),
        timestep=TIMESTEP if TIMESTEP in names else None,
        result=Skeleton("tuple", ((0, RESULT),)),
        limits=limits_of(examples),
    )


def check_signature(signature: Signature, blueprint: Blueprint) -> None:
    """Refuse to write what `read_signature` would refuse to read."""
    read_signature(Field(_signature(signature), MANIFEST, "signature"), blueprint)


def read_recipe(field: Field) -> Recipe:
    """The recipe; fields that it lacks have their defaults."""
    try:
        return Recipe.from_json(field.plain(_DEEPEST))
    except (RecipeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{field.file}: {field.path}: {error}") from error


def read_original(field: Field) -> tuple[type[nn.Module] | None, Any]:
    """The class, if this diffusers has it, and the config."""
    entry = field.record(("class", "config"))
    config = None
    if entry["config"].value is not None:
        members = entry["config"].members(1024)
        for key, member in members.items():
            if not _WORD.fullmatch(key) or hasattr(dict, key):
                member.fail("is not the name of a setting")
        config = FrozenDict({key: member.plain() for key, member in members.items()})
    if entry["class"].value is None:
        return None, config
    match = _CLASS.fullmatch(entry["class"].text(_CLASS))
    assert match is not None
    try:
        found = getattr(importlib.import_module(match[1]), match[2], None)
    except ImportError:
        found = None
    fits = isinstance(found, type) and issubclass(found, nn.Module)
    return (found if fits else None), config


def read_origin(manifest: Mapping[str, Field], document: Document) -> Origin:
    """What saving the loaded model again needs."""
    entry = manifest["calibration"].record(("calls", "timesteps"))
    return Origin(
        document=document,
        problem="",
        original=manifest["original"].value["class"],
        calls=entry["calls"].integer(0),
        timesteps=tuple(t.number() for t in entry["timesteps"].items()),
    )


def read_summary(field: Field) -> int:
    """The size of the original; the rest of the summary follows from the graph."""
    entry = field.record(("precision", "stayed_float", "bytes_before"))
    for count in entry["precision"].members(64).values():
        count.integer(0)
    for layers in entry["stayed_float"].members(4096).values():
        for layer in layers.items():
            layer.text()
    return entry["bytes_before"].integer(0)
