"""A lowered graph as plain data, graph.json, and back.

What is written is the graph before it is bound to a machine: PyTorch's operators and our own, which
name the reference kernel. Binding (the dtype of float parts, kernels) runs again wherever it is
loaded.

    symbols   {"B": [2, 63, 2], ...}                range and example of the sizes that calls choose
    facts     ["h % 2 == 0", ...]                   what is true of them
    inputs    [{name, dtype, shape, notes}, ...]    shape: ["B", 4, "8*h", "8*w"]
    tensors   {target: {dtype, stored, shape, parameter}, ...}
    nodes     [{name, op, args, kwargs, notes}, ...]
    outputs   names of the nodes that are returned

Arguments: see fxquant.runtime.vocabulary; operators: fxquant.runtime.operators. `dtype` is what the
graph computes with, `stored` what the file holds: float weights are stored as they run.
"""

from __future__ import annotations

import builtins
import json
import keyword
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from fxquant.errors import ArtifactError
from fxquant.graph.nodes import attribute, refresh
from fxquant.graph.results import parts, result_of
from fxquant.runtime import operators, vocabulary
from fxquant.runtime.checks import check_call
from fxquant.runtime.fields import WHOLE, Field, shown
from fxquant.runtime.notes import NODE_NAME, read_notes, written_notes
from fxquant.runtime.sizes import Symbols, describe, placeholders

Document = dict[str, Any]

ROW = "row"
_TARGET = re.compile(
    r"(?:[A-Za-z_][A-Za-z0-9_]{0,99}|[0-9]{1,9})(?:\.(?:[A-Za-z_]\w{0,99}|[0-9]{1,9})){0,31}",
    re.ASCII,
)
_MOST_NODES = 1 << 16
_MOST_ELEMENTS = 2**36  # of a value, at example sizes
_MOST_PARTS = 1 << 17  # of what splits and their like return, together
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_DTYPES = frozenset(vocabulary.DTYPES.values())


def to_document(lowered: GraphModule, bound: GraphModule) -> Document:
    """The saved form of a graph.

    Args:
        lowered: the graph after the LOWER passes.
        bound: the same after BIND; its tensors are what gets stored.

    Raises:
        ArtifactError: something that the format cannot say.
    """
    inputs = placeholders(lowered)
    sizes = describe(n.meta["val"] for n in inputs)
    calls = [n for n in lowered.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    output = next(n for n in lowered.graph.nodes if n.op == "output")
    return {
        "symbols": sizes.symbols,
        "facts": sizes.facts,
        "inputs": [_input(n, shape) for n, shape in zip(inputs, sizes.shapes, strict=True)],
        "tensors": {target: _tensor(lowered, bound, target) for target in _targets(lowered)},
        "nodes": [_node(n) for n in calls],
        "outputs": [node.name for node in parts(output.args[0])],
    }


def to_bytes(document: Document) -> bytes:
    """JSON with a line for each tensor and node, the same bytes for the same document."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    tensors = [f"{compact(k)}:{compact(v)}" for k, v in document["tensors"].items()]
    parts = {
        "symbols": compact(document["symbols"]),
        "facts": _lines("[]", [compact(fact) for fact in document["facts"]]),
        "inputs": _lines("[]", [compact(i) for i in document["inputs"]]),
        "tensors": _lines("{}", tensors),
        "nodes": _lines("[]", [compact(n) for n in document["nodes"]]),
        "outputs": compact(document["outputs"]),
    }
    return ("{" + ",\n".join(f'"{k}":{v}' for k, v in parts.items()) + "}\n").encode()


def _lines(brackets: str, lines: list[str]) -> str:
    return brackets[0] + "\n" + ",\n".join(lines) + "\n" + brackets[1]


def _targets(gm: GraphModule) -> list[str]:
    """Names of the tensors that the graph reads, in order of first use."""
    reads = (i for n in gm.graph.nodes for i in n.all_input_nodes if i.op == "get_attr")
    return list(dict.fromkeys(str(n.target) for n in reads))


def _input(node: Node, shape: list[int | str]) -> dict[str, Any]:
    dtype = vocabulary.encoded(node.meta["val"].dtype)["dtype"]
    return {"name": node.name, "dtype": dtype, "shape": shape, "notes": written_notes(node)}


def _tensor(lowered: GraphModule, bound: GraphModule, target: str) -> dict[str, Any]:
    value, kept = attribute(lowered, target), attribute(bound, target)
    return {
        "dtype": vocabulary.encoded(value.dtype)["dtype"],
        "stored": vocabulary.encoded(kept.dtype)["dtype"],
        "shape": list(value.shape),
        "parameter": isinstance(value, nn.Parameter),
    }


def _node(node: Node) -> dict[str, Any]:
    written = {
        "name": node.name,
        "op": operators.name_of(node),
        "args": [vocabulary.encoded(a) for a in node.args],
        "kwargs": {k: vocabulary.encoded(v) for k, v in node.kwargs.items()},
        "notes": written_notes(node),
    }
    return {k: v for k, v in written.items() if k not in ("kwargs", "notes") or v}


class Blueprint:
    """A checked document: the graph with example values, and what tensors it wants.

    Attributes:
        graph: the FX graph; every node has its example value.
        tensors: by target, the entry of the document.

    Raises:
        ArtifactError: the document is not one that to_document writes; names the field.
    """

    def __init__(self, document: Field):
        fields = document.record(("symbols", "facts", "inputs", "tensors", "nodes", "outputs"))
        self._symbols = Symbols(fields["symbols"], fields["facts"])
        # What has no fake kernel would run the real one, with memory for all its arguments.
        self._mode = FakeTensorMode(
            shape_env=self._symbols.environment, allow_fallback_kernels=False
        )
        self._mode.cache_enabled = False  # keys of symbolic sizes cost more than they save
        self._scaffold = GraphModule(nn.Module(), Graph())
        self._fields: dict[Node, Field] = {}
        self._nodes: dict[str, Node] = {}
        self._constants: dict[str, Node] = {}
        self._table = fields["tensors"].members()
        self.graph: Graph = self._scaffold.graph
        self.tensors = {k: self._checked_tensor(k, f) for k, f in self._table.items()}
        self._read_inputs(fields["inputs"])
        for field in fields["nodes"].items(_MOST_NODES):
            self._read_node(field)
        self._read_outputs(fields["outputs"])
        self._propagate()

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """Name and rank of the inputs that calls give."""
        nodes = placeholders(self._scaffold)[:-1]
        return [(n.name, n.meta["val"].ndim) for n in nodes]

    @property
    def outputs(self) -> int:
        """How many tensors it returns."""
        return len(parts(next(iter(reversed(self.graph.nodes))).args[0]))

    @property
    def examples(self) -> list[Tensor]:
        """Example values of the inputs that calls give."""
        return [n.meta["val"] for n in placeholders(self._scaffold)[:-1]]

    @property
    def rows(self) -> int:
        """Number of activation quantisers."""
        return int(self._nodes[ROW].meta["val"].shape[0])

    def build(self, tensors: Mapping[str, Tensor]) -> GraphModule:
        """The graph over tensors by target, of which there must be one for each entry."""
        holder = nn.Module()
        for target, entry in self.tensors.items():
            value = tensors[target]
            bound = nn.Parameter(value, requires_grad=False) if entry["parameter"] else value
            self._attach(holder, target, bound)
        return GraphModule(holder, self.graph, class_name="Loaded")

    def _attach(self, owner: nn.Module, target: str, value: Tensor) -> None:
        *path, leaf = target.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)

    def _checked_tensor(self, target: str, field: Field) -> dict[str, Any]:
        parts = target.split(".")
        if not _TARGET.fullmatch(target) or any(hasattr(self._scaffold, p) for p in parts):
            field.fail("is not a name that a tensor of a graph can have")
        if any(".".join(parts[:k]) in self._table for k in range(1, len(parts))):
            field.fail("is inside another tensor")
        entry = field.record(("dtype", "stored", "shape", "parameter"))
        dtype, stored = (
            vocabulary.DTYPES[entry[k].one_of(vocabulary.DTYPES)] for k in ("dtype", "stored")
        )
        if stored != dtype and not (stored.is_floating_point and dtype.is_floating_point):
            entry["stored"].fail(f"{stored} cannot stand for {dtype}")
        if entry["parameter"].boolean() and not dtype.is_floating_point:
            entry["parameter"].fail("integers are no parameters")
        shape = [size.integer(0, 2**31 - 1) for size in entry["shape"].items(8)]
        return {
            "dtype": dtype,
            "stored": stored,
            "shape": shape,
            "parameter": entry["parameter"].value,
        }

    def _read_inputs(self, field: Field) -> None:
        for item in field.items(1024):
            entry = item.record(("name", "dtype", "shape", "notes"))
            node = self._add(entry["name"], "placeholder", entry["name"].text(NODE_NAME), (), {})
            node.meta = {"custom": {"fxquant": read_notes(entry["notes"])}}
            shape = [self._symbols.size(s) for s in entry["shape"].items(8)]
            with self._mode:
                dtype = vocabulary.DTYPES[entry["dtype"].one_of(vocabulary.DTYPES)]
                node.meta["val"] = torch.empty(shape, dtype=dtype, device="cpu")
        last = list(self._nodes.values())[-1:]
        if not last or last[0].name != ROW or last[0].meta["val"].dtype != torch.float32:
            field.fail(f"the last input is not a float32 {ROW!r}")
        shape = last[0].meta["val"].shape
        if len(shape) != 2 or not isinstance(shape[0], int) or shape[1] != 2:
            field.fail(f"{ROW!r} is not of shape [n, 2]")

    def _read_node(self, field: Field) -> None:
        entry = field.record(("name", "op", "args"), ("kwargs", "notes"))
        target = operators.named(entry["op"].text(limit=200))
        if target is None:
            entry["op"].fail(f"{shown(entry['op'].value)} is no operator of saved graphs")
        args = tuple(vocabulary.decoded(a, self._reference) for a in entry["args"].items(64))
        kwargs = entry["kwargs"].members(32) if "kwargs" in entry else {}
        named = {k: vocabulary.decoded(v, self._reference) for k, v in kwargs.items()}
        for key in named:
            if not NODE_NAME.fullmatch(key) or keyword.iskeyword(key):
                field.fail(f"{key!r} is no argument name")
        node = self._add(entry["name"], "call_function", target, args, named)
        notes = read_notes(entry["notes"]) if "notes" in entry else {}
        node.meta = {"custom": {"fxquant": notes}}
        self._fields[node] = field

    def _add(self, field: Field, op: str, target: Any, args: Any, kwargs: Any) -> Node:
        name = field.text(NODE_NAME)
        if name in self._nodes or keyword.iskeyword(name) or name in vars(builtins):
            field.fail(f"{name!r} is taken")
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        node.name = name
        self._nodes[name] = node
        return node

    def _reference(self, kind: str, field: Field) -> Node:
        name = field.text()
        if kind == "node":
            if name not in self._nodes:
                field.fail(f"no earlier node is called {name[:60]!r}")
            return self._nodes[name]
        if name not in self.tensors:
            field.fail(f"no tensor is called {name[:60]!r}")
        if name not in self._constants:
            node = self.graph.create_node("get_attr", name, (), {})
            entry = self.tensors[name]
            with self._mode:
                value = torch.empty(entry["shape"], dtype=entry["dtype"], device="cpu")
                node.meta["val"] = value
            self._constants[name] = node
        return self._constants[name]

    def _read_outputs(self, field: Field) -> None:
        unused = [name for name in self.tensors if name not in self._constants]
        if unused:
            self._table[unused[0]].fail("is used by no node")
        returned = []
        for item in field.items():
            name = item.text()
            if name not in self._nodes:
                item.fail(f"no node is called {name[:60]!r}")
            returned.append(self._nodes[name])
        if not returned:
            field.fail("names no node")
        self.graph.output(result_of(returned))

    def _propagate(self) -> None:
        """Give every node its example value."""
        parts = 0
        for node, field in self._fields.items():
            try:
                check_call(node, self.rows)
                with _no_tracebacks():
                    refresh(self._scaffold, node)
                self._symbols.bound(node)
                parts += _check_value(node.meta["val"], self._symbols)
                if parts > _MOST_PARTS:
                    raise ArtifactError(f"is beyond the {_MOST_PARTS} values that a graph has")
            except ArtifactError as error:
                field.fail(str(error))
            except Exception as error:
                reason = str(error).strip().partition("\n")[0][:300]
                raise ArtifactError(
                    f"{field.file}: {field.path}: {node.target} cannot take these arguments: "
                    f"{type(error).__name__}: {reason}"
                ) from error
        output = next(iter(reversed(self.graph.nodes)))
        for node in output.all_input_nodes:
            if not isinstance(node.meta["val"], Tensor):
                raise ArtifactError(f"{field.file}: outputs: %{node.name} is no tensor")


def from_document(document: Field, tensors: Mapping[str, Tensor]) -> GraphModule:
    """The graph that `to_document` was given, over new symbolic example values.

    Args:
        tensors: by target, in the dtypes that the document says are stored.

    Raises:
        ArtifactError: names the field that is wrong.
    """
    return Blueprint(document).build(tensors)


@contextmanager
def _no_tracebacks() -> Iterator[None]:
    """torch logs a traceback of what it also raises; we report the latter."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _check_value(value: Any, symbols: Symbols) -> int:
    """Refuse values no graph of ours has: before they are multiplied any further.

    Returns:
        how many tensors it is.
    """
    if isinstance(value, _NUMBERS):
        number = symbols.example(value) if isinstance(value, torch.SymInt) else _number(value)
        if number is None or not -WHOLE <= number < WHOLE:
            raise ArtifactError("computes a size that is too large")
        return 0
    tensors = value if isinstance(value, (list, tuple)) else (value,)
    for tensor in tensors:
        if not isinstance(tensor, FakeTensor):
            raise ArtifactError(f"gives a {type(tensor).__name__} instead of a tensor")
        if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
            raise ArtifactError(f"gives a {tensor.layout} tensor of {tensor.dtype}")
        elements = 1
        for size in tensor.shape:
            elements *= max(
                1, symbols.example(size)
            )  # of nothing in one dimension, loops run over others
        if elements > _MOST_ELEMENTS:
            raise ArtifactError(f"gives a tensor of {elements:.1e} elements")
    return len(tensors)


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else value.node.hint
