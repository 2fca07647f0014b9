"""Saved models: what `save_pretrained` writes and `fxquant.load` reads.

    fxquant.json               format, checksums, recipe, signature, config, calibration record
    graph-HASH.json            the quantised graph; see fxquant.runtime.document
    model-HASH.safetensors     integer weights, float leftovers, the activation table

The bytes depend on the model and on the versions of fxquant, torch and diffusers alone: no clock,
no paths, no machine. Nothing in the files is executed or unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import ArtifactError
from fxquant.graph.nodes import attribute
from fxquant.graph.signature import Signature
from fxquant.quant.table import ActivationTable
from fxquant.recipe import Recipe
from fxquant.runtime import folder as folders
from fxquant.runtime import manifest as manifests
from fxquant.runtime.document import Blueprint, Document, to_bytes, to_document
from fxquant.runtime.fields import Field, parse
from fxquant.runtime.folder import MANIFEST, Written
from fxquant.runtime.manifest import Origin
from fxquant.runtime.tensors import MappedTensors, restored, storable, stored_form, stream
from fxquant.runtime.upgrade import upgraded
from fxquant.runtime.vocabulary import DTYPES

if TYPE_CHECKING:
    from fxquant.runtime.model import QuantizedModel

_GRAPH, _TABLE = "graph.", "table."  # prefixes of tensor names, as in QuantizedModel.state_dict()
_MANIFEST_LIMIT = 16 << 20
_GRAPH_LIMIT = 256 << 20


@dataclass(frozen=True)
class Artifact:
    """A saved model as it was read: not bound to a machine yet."""

    graph: GraphModule
    table: ActivationTable
    signature: Signature
    recipe: Recipe
    config: Any
    origin: Origin
    original: type[nn.Module] | None
    bytes_before: int
    mapping: MappedTensors

    def release(self, target: str) -> None:
        """Give back the memory of a weight that was packed; it stays readable from the file."""
        self.mapping.release([_GRAPH + target])


def origin_of(
    lowered: GraphModule,
    bound: GraphModule,
    kind: type,
    signature: Signature,
    calls: int,
    timesteps: Iterable[float],
) -> Origin:
    """What a freshly compiled model remembers; one without a saved form remembers why."""
    document: Document | None = None
    problem = ""
    try:
        document = to_document(lowered, bound)
        # What cannot be read is not written either.
        blueprint = Blueprint(parse(to_bytes(document), "graph.json"))
        manifests.check_signature(signature, blueprint)
    except ArtifactError as error:
        document, problem = None, str(error)
    distinct = tuple(sorted(set(timesteps)))
    return Origin(document, problem, manifests.class_path(kind), calls, distinct)


def fingerprint(graph: GraphModule) -> str:
    """Another one when a node is another; tensors may change, and are saved as they are."""
    digest = hashlib.blake2b(digest_size=16)
    for node in graph.graph.nodes:
        digest.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n".encode())
    return digest.hexdigest()


def save(model: QuantizedModel, folder: str | Path) -> None:
    """Write a model into a folder, replacing one that is there at a single stroke.

    Raises:
        ArtifactError: the graph has no saved form or was edited, the disk is full, the folder is
            read-only ...
    """
    origin = model.origin
    if origin is None or origin.document is None:
        reason = origin.problem if origin else "it was not made by fxquant.compile or fxquant.load"
        raise ArtifactError(f"this model cannot be saved: {reason}")
    if fingerprint(model.graph) != model.fingerprint:
        raise ArtifactError(
            "this model cannot be saved: model.graph is another graph than compile or load made, "
            "and what is saved is that one. Save first and edit what fxquant.load returns"
        )
    if not str(folder).strip():
        raise ArtifactError("the folder's name is empty: name one ('.' is the working folder)")
    document = to_bytes(origin.document)
    with folders.writing(Path(folder)) as writer:
        tensors = writer.add("model", "safetensors", stream(_tensors(model, origin.document)))
        graph = writer.add("graph", "json", [document])
        writer.publish(manifests.to_bytes(model, origin, tensors, graph))


def _tensors(model: QuantizedModel, document: Document) -> dict[str, Tensor]:
    """By name in state_dict(), in the dtypes that the document says."""
    tensors = {_TABLE + name: value for name, value in model.table.named_buffers()}
    for target, entry in document["tensors"].items():
        value = attribute(model.graph, target).detach()
        tensors[_GRAPH + target] = storable(value.to(DTYPES[entry["stored"]]))
    return tensors


def read(folder: str | Path) -> Artifact:
    """Check a saved model and rebuild its graph. Integer weights stay on disk until they are used.

    Raises:
        ArtifactError: see there.
    """
    folder = Path(folder)
    with folders.reading(folder):
        manifest = _read_manifest(folder)
        document = upgraded(_read_graph(folder, manifest["graph"]), manifest["format"].value)
        with ThreadPoolExecutor(1) as other:  # hashing leaves Python to us
            mapped = other.submit(_map_model, folder, manifest["model"])
            blueprint = Blueprint(document)
        mapping = mapped.result()
    graph = blueprint.build(_matched(blueprint, mapping, manifest["model"]))
    original, config = manifests.read_original(manifest["original"])
    return Artifact(
        graph=graph,
        table=_read_table(mapping, blueprint, manifest["model"]),
        signature=manifests.read_signature(manifest["signature"], blueprint),
        recipe=manifests.read_recipe(manifest["recipe"]),
        config=config,
        origin=manifests.read_origin(manifest, document.value),
        original=original,
        bytes_before=manifests.read_summary(manifest["summary"]),
        mapping=mapping,
    )


def _read_manifest(folder: Path) -> dict[str, Field]:
    if not (folder / MANIFEST).exists():
        raise ArtifactError(_foreign(folder))
    with folders.opened(folder, MANIFEST) as (descriptor, size):
        if size > _MANIFEST_LIMIT:
            raise ArtifactError(f"{folder / MANIFEST}: is {size} bytes long, which it never is")
        whole = parse(folders.content(descriptor, size), str(folder / MANIFEST))
    return manifests.verified(whole)


def _foreign(folder: Path) -> str:
    """What to say about a folder without our manifest."""
    if (folder / "model_index.json").exists():
        return (
            f"{folder} holds a diffusers pipeline, not a compiled model. Load it with diffusers' "
            "DiffusionPipeline.from_pretrained, compile its unet with fxquant.compile(pipe.unet, "
            "calls), and save what that returns"
        )
    if (folder / "config.json").exists():
        return (
            f"{folder} holds a diffusers model, not a compiled one. Load it with from_pretrained "
            "of its class, compile it with fxquant.compile(model, calls), and save what that "
            "returns"
        )
    return f"{folder} holds no saved model: {MANIFEST} is missing. Was saving it interrupted?"


def _read_graph(folder: Path, entry: Field) -> Field:
    written = manifests.described(entry, "graph")
    if written.bytes > _GRAPH_LIMIT:
        entry.fail(f"is {written.bytes} bytes long, which no graph is")
    with _verified(folder, written) as (descriptor, size):
        return parse(folders.content(descriptor, size), str(folder / written.name))


def _map_model(folder: Path, entry: Field) -> MappedTensors:
    written = manifests.described(entry, "model")
    with _verified(folder, written) as (descriptor, size):
        return MappedTensors(descriptor, size, str(folder / written.name))


@contextmanager
def _verified(folder: Path, written: Written) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a file that has the size and the checksum it should have."""
    with folders.opened(folder, written.name) as (descriptor, size):
        file = Field(None, str(folder / written.name))
        if size != written.bytes:
            file.fail(f"has {size} bytes, should have {written.bytes}. Copy or save it again")
        if folders.hash_of(descriptor) != written.sha256:
            file.fail(
                "does not match its checksum: it was changed or damaged. Copy or save it again"
            )
        yield descriptor, size


def _matched(blueprint: Blueprint, mapping: MappedTensors, field: Field) -> dict[str, Tensor]:
    """The graph's tensors by target: floats in memory, integers in the mapped file."""
    entries = mapping.entries
    wanted = {_GRAPH + target for target in blueprint.tensors}
    for name in entries:
        if name not in wanted and not name.startswith(_TABLE):
            field.fail(f"has a tensor {name[:80]!r} that the graph does not use")
    found: dict[str, Tensor] = {}
    for target, entry in blueprint.tensors.items():
        name = _GRAPH + target
        if name not in entries:
            field.fail(f"lacks the tensor {name[:80]!r}")
        expected = stored_form(entry["stored"], entry["shape"])
        if entries[name] != expected:
            field.fail(f"{name[:80]!r} is {entries[name]}, the graph says {expected}")
        is_weight = entry["dtype"] in (torch.int8, torch.uint8)
        value = mapping.view(name) if is_weight else mapping.copy(name)
        found[target] = restored(value, entry["stored"])
    return found


def _read_table(mapping: MappedTensors, blueprint: Blueprint, field: Field) -> ActivationTable:
    entries = {k: v for k, v in mapping.entries.items() if k.startswith(_TABLE)}
    names = [_TABLE + part for part in ("values", "timesteps", "groups")]
    if sorted(entries) != sorted(names):
        field.fail(f"should have the tensors {', '.join(names)}")
    values, timesteps, groups = (mapping.copy(name) for name in names)
    rows = blueprint.rows
    if values.dtype != torch.float32 or values.ndim != 3 or tuple(values.shape[1:]) != (rows, 2):
        field.fail(f"table.values is not float32 [G, {rows}, 2]")
    if values.shape[0] < 1 or not torch.isfinite(values).all() or not (values[..., 0] > 0).all():
        field.fail("table.values has scales that are not positive")
    zeros = values[..., 1]
    if not torch.equal(zeros, zeros.round()) or (zeros.abs() > 2**15).any():
        field.fail("table.values has zero points that are no integers")
    if timesteps.dtype != torch.float32 or timesteps.ndim != 1 or not len(timesteps):
        field.fail("table.timesteps is not float32 [K]")
    if not torch.isfinite(timesteps).all() or (timesteps.diff() < 0).any():
        field.fail("table.timesteps does not ascend")
    if groups.dtype != torch.int64 or groups.shape != timesteps.shape:
        field.fail("table.groups is not int64 [K]")
    if (groups < 0).any() or (groups >= values.shape[0]).any():
        field.fail("table.groups names rows that the table does not have")
    return ActivationTable(values, timesteps, groups)
