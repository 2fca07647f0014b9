"""A model's values for all calibration samples, computed from unit to unit.

Every node is computed once: a stream keeps the values that nodes ahead of it still read, and drops
the others. Of a value that a batch has together, as a mean over it, each sample keeps a copy; a
later batch, of other samples, reads that of its first one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.nodes import is_symbolic
from fxquant.graph.samples import has_samples
from fxquant.graph.segment import before, inputs_of, segment
from fxquant.reconstruction.cache import Cache, Stored


@dataclass(frozen=True)
class Samples:
    """Calibration samples, un-batched.

    Attributes:
        tensors: flat graph inputs [N, ...].
        rows: table rows, int64 [N].
        shared: graph inputs that all samples have together, by position; `tensors` are the others.
    """

    tensors: tuple[Tensor, ...]
    rows: Tensor
    shared: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


class Stream:
    """Values of one graph, advanced in execution order.

    Args:
        gm: a specialised graph of (*samples, row); its weights may change ahead of the stream.
        samples: its inputs.
        cache: holds the values.
        batch: samples computed at once.
    """

    def __init__(self, gm: GraphModule, samples: Samples, cache: Cache, batch: int):
        self._gm, self._samples, self._cache, self._batch = gm, samples, cache, batch
        self._inputs = {n.name: k for k, n in enumerate(inputs_of(gm)[: len(samples.tensors)])}
        self._varying = _varying(gm)
        computed = {n for n in self._varying - set(inputs_of(gm)) if _is_tensor(n)}
        self._shared = {n.name for n in computed if not has_samples(n)}
        self._done: set[Node] = set(inputs_of(gm))
        self._known: dict[str, Stored] = {}

    def advance(self, names: Sequence[str], table: Tensor) -> None:
        """Compute the named nodes.

        Args:
            table: [G, n, 2] activation parameters; each sample uses its own row.
        """
        by_name = {n.name: n for n in self._gm.graph.nodes}
        ends = [by_name[name] for name in (*self._known, *self._inputs)]
        new = before([by_name[name] for name in names], ends) & self._varying
        new |= self._members(new)
        self._done |= new
        ahead = {n.name for n in self._done if n.name not in self._inputs and self._read_ahead(n)}
        kept = [n.name for n in self._gm.graph.nodes if n in new and n.name in ahead]
        if kept:
            self._compute(kept, table)
        for name in [n for n in self._known if n not in ahead]:
            self._cache.drop(self._known.pop(name))

    def __getitem__(self, name: str) -> Tensor | Stored:
        """A computed value, or an input; index it by sample."""
        if name in self._inputs:
            return self._samples.tensors[self._inputs[name]]
        return self._known[name]

    def _members(self, nodes: set[Node]) -> set[Node]:
        """The members of lists among the nodes: what is kept of a list is its members."""
        found: set[Node] = set()
        for node in self._gm.graph.nodes:
            if node.target is operator.getitem and node.args[0] in nodes | found:
                found.add(node)
        return found & self._varying

    def _read_ahead(self, node: Node) -> bool:
        return _is_tensor(node) and any(
            u not in self._done and u in self._varying for u in node.users
        )

    def _compute(self, names: Sequence[str], table: Tensor) -> None:
        known = list(self._known)
        part = segment(self._gm, names, known)
        for start, index in self._batches():
            inputs = [t[index].to(table.device) for t in self._samples.tensors]
            given = [self._known[name][index].to(table.device) for name in known]
            row = table[self._samples.rows[index].to(table.device)]
            with torch.no_grad():
                results = part(*inputs, row, *given)
            for name, result in zip(names, results, strict=True):
                is_shared = name in self._shared
                value = for_each(result, len(index)) if is_shared else result
                if name not in self._known:
                    self._known[name] = self._cache.new(
                        len(self._samples), value, len(index), is_shared
                    )
                self._known[name].write(start, value)

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        for index in torch.arange(len(self._samples)).split(self._batch):
            yield int(index[0]), index


def for_each(value: Tensor, samples: int) -> Tensor:
    """What a batch has together, for each of its samples: [b, ...]."""
    return value.unsqueeze(0).expand(samples, *value.shape)


def _is_tensor(node: Node) -> bool:
    """Is it one tensor, not a list of several as `chunk` gives?"""
    return isinstance(node.meta["val"], Tensor)


def _varying(gm: GraphModule) -> set[Node]:
    """Tensors, and lists of them, that depend on the inputs, if only on the batch.

    Weights and sizes are had again wherever needed.
    """
    found: set[Node] = set()
    for node in gm.graph.nodes:
        read = node.all_input_nodes
        depends = node.op == "placeholder" or any(n in found or is_symbolic(n) for n in read)
        if depends and not is_symbolic(node) and node.op != "output":
            found.add(node)
    return found
