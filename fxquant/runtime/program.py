"""A lowered graph as one Python function that calls kernels directly.

A step of a large UNet is a thousand kernels with a few thousand weights. Running the graph module
itself, each weight is looked up through half a dozen modules and each kernel through the
dispatcher, in code that the kernels between have driven out of the caches: a few percent of a step
on a CPU, and most of it for a small model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fxquant.graph.lowered import is_op
from fxquant.graph.nodes import aten
from fxquant.graph.results import Result
from fxquant.kernels import dispatch
from fxquant.kernels.config import Kernel

_METHODS = {
    aten.reshape.default: "reshape",
    aten.view.default: "view",
    aten.transpose.int: "transpose",
    aten.permute.default: "permute",
}
_ORDER = {"placeholder": 0, "get_attr": 1}  # as arguments; the rest follows
_Owned = tuple[MutableMapping[str, Any], str]
_Child = tuple[Mapping[str, nn.Module | None], str, nn.Module]
_version = attrgetter("_version")


@dataclass(frozen=True)
class Reading:
    """A graph as it was when its nodes were read: what belongs together, and never changes.

    Attributes:
        function: takes the graph's inputs and then `tensors`.
        is_repeatable: whether all kernels are.
    """

    source: Callable[..., Any]
    function: Callable[..., Result]
    owned: tuple[_Owned, ...]
    modules: tuple[_Child, ...]
    is_repeatable: bool

    def is_of(self, graph: GraphModule) -> bool:
        """Was the graph read as it is now: its nodes, and where its tensors are kept?"""
        return (
            self.source is _source(graph)
            and all(children.get(name) is module for children, name, module in self.modules)
            and all(name in owner for owner, name in self.owned)
        )

    def tensors(self) -> list[Tensor]:
        """The graph's own, of now: weights, scales, constants."""
        return [owner[name] for owner, name in self.owned]


@dataclass(frozen=True)
class State:
    """A program's graph and tensors at one time, and how to tell that they are others.

    Whoever repeats a step without looking at the graph's tensors asks before each time. A write
    through `.data` counts as no change: `torch.autograd.graph.increment_version` tells.
    """

    reading: Reading
    tensors: list[Tensor]
    versions: list[int]
    addresses: list[int]
    memory: list[object]
    """The tensors', held so that no others can be at these addresses."""

    def is_of(self, program: Program) -> bool:
        """Is the program as it was, with the same tensors, unchanged?"""
        if program.reading() is not self.reading:
            return False
        tensors = self.reading.tensors()
        return (
            all(map(is_, tensors, self.tensors))
            and self.versions == [*map(_version, tensors)]
            and self.addresses == [*map(Tensor.data_ptr, tensors)]
        )


class Program:
    """Computes what ``graph`` does when called with the same tensors, without autograd.

    The graph's nodes are read once, and again when it was recompiled or one of its modules is
    another; its tensors in every call. So whoever changes a node, or puts another tensor or module
    in the place of one, is served with it. A call
    in another thread while the graph is recompiled is served with the graph before or after, not
    with parts of both; nodes are changed by one thread at a time.
    """

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self._reading = _read(graph)

    def __call__(self, *tensors: Tensor) -> Result:
        return self.graph(*tensors) if is_watched() else self.run(*tensors)

    def run(self, *tensors: Tensor) -> Result:
        """The same, whoever watches."""
        reading = self.reading()
        return reading.function(*tensors, *reading.tensors())

    def reading(self) -> Reading:
        """The present graph's; take it once for each call."""
        reading = self._reading
        if not reading.is_of(self.graph):
            reading = self._reading = _read(self.graph)
        return reading

    def state(self) -> State | None:
        """What the next call would be made from; None if its tensors count no changes, as those
        made in inference mode."""
        reading = self.reading()
        tensors = reading.tensors()
        if any(tensor.is_inference() for tensor in tensors):
            return None
        versions, addresses = map(_version, tensors), map(Tensor.data_ptr, tensors)
        memory = (tensor.untyped_storage() for tensor in tensors)
        return State(reading, tensors, [*versions], [*addresses], [*memory])

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return type(self)(copy.deepcopy(self.graph, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.graph,)


def is_watched() -> bool:
    """Does something look at operators, and must be shown them?"""
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch._C._autograd._profiler_enabled()
        or _get_current_dispatch_mode() is not None
        or torch._C._len_torch_function_stack() > 0
    )


def _source(graph: GraphModule) -> Callable[..., Any]:
    """Another one whenever the graph was recompiled: every graph module has a class of its own."""
    return type(graph).forward


def _read(module: GraphModule) -> Reading:
    source = _source(module)  # first: if the graph changes meanwhile, it is read again
    graph = module.graph
    lifted, names = _lifted(graph)
    return Reading(
        source,
        GraphModule(nn.Module(), lifted).forward,
        tuple(_owned(module, name) for name in names),
        tuple(_children(module, names)),
        all(_kernel(n).is_repeatable for n in graph.nodes if is_op(n)),
    )


def _lifted(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph with its tensors as further inputs, in the order of the names returned, and with
    functions and methods for operators."""
    lifted, copies = Graph(), dict[Node, Node]()
    names: list[str] = []
    for node in sorted(graph.nodes, key=lambda node: _ORDER.get(node.op, len(_ORDER))):
        if node.op == "get_attr":
            copies[node] = lifted.placeholder(f"tensor_{len(names)}")
            names.append(str(node.target))
        else:
            copies[node] = _direct(lifted.node_copy(node, copies.__getitem__))
    return lifted, names


def _direct(node: Node) -> Node:
    if is_op(node):
        node.target, node.args = _kernel(node).run, node.args[:-1]
    elif node.target in _METHODS:
        node.op, node.target = "call_method", _METHODS[node.target]
    return node


def _kernel(node: Node) -> Kernel:
    return dispatch.named(str(node.target).split(".")[1], str(node.args[-1]))


def _owned(graph: GraphModule, name: str) -> _Owned:
    """Where a module keeps a tensor: a dictionary and the key in it."""
    path, _, key = name.rpartition(".")
    module: nn.Module = graph.get_submodule(path)
    for owner in (module._parameters, module._buffers):
        if key in owner:
            return owner, key
    return vars(module), key


def _children(graph: GraphModule, names: Iterable[str]) -> Iterator[_Child]:
    """The modules on the way to these tensors, and where their parents keep them."""
    paths = {name.rpartition(".")[0] for name in names}
    while paths - {""}:
        for parent, _, child in (path.rpartition(".") for path in sorted(paths - {""})):
            module = graph.get_submodule(parent)
            yield module._modules, child, module.get_submodule(child)
        paths = {path.rpartition(".")[0] for path in paths}
