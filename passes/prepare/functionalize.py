"""Replace operators that write into their input by ones that return a new tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from fxquant.errors import CaptureError
from fxquant.graph.aliases import Sharing, closure, writes, written
from fxquant.graph.dump import line
from fxquant.graph.nodes import aten, attribute, call, calls, is_random, replace
from fxquant.graph.options import Options
from fxquant.graph.source import source_line
from fxquant.graph.views import NoInverseError, Value, again, alike, scattered
from fxquant.graph.writes import (
    NoCounterpartError,
    changes_shape,
    hidden_write,
    view_instead,
    what_is_written,
)

log = logging.getLogger(__name__)


def functionalize(gm: GraphModule, *, options: Options) -> GraphModule:
    """Every later pass may then move, repeat or drop nodes freely.

        %mul: f32[Bx4x8x8] = mul(%sample, 2)
        %slice_1: f32[Bx2x8x8] = slice(%mul, 1, 0, 2)
        %add_: f32[Bx2x8x8] = add_(%slice_1, 1)
        %relu: f32[Bx4x8x8] = relu(%mul)
    becomes
        %slice_1: f32[Bx2x8x8] = slice(%mul, 1, 0, 2)
        %add_: f32[Bx2x8x8] = add(%slice_1, 1)
        %slice_scatter: f32[Bx4x8x8] = slice_scatter(%mul, %add_, 1, 0, 2, 1)
        %relu: f32[Bx4x8x8] = relu(%slice_scatter)

    A write goes up to the whole that the tensor is a view of; other views of it are taken anew
    where they are read next. Memory that nobody wrote into (empty) holds zeros.

    Raises CaptureError for what cannot be said so: state that the model keeps from call to call,
    views that repeat an element, operators that have no such counterpart.
    """
    _fill_empty(gm)
    for node in gm.graph.nodes:
        _check(gm, node)
        _draw_as_captured(node)
    starts = [target for node in gm.graph.nodes for target in written(node).values()]
    if starts:
        _Walk(gm, closure(starts)).run()
    return gm


@dataclass(eq=False)
class _Memory:
    """What one allocation holds: `version` counts the writes into it."""

    origin: Node
    version: int = 0
    lost: Node | None = None
    """A call that may return a view of it, and nobody can say which."""


@dataclass(eq=False)
class _Tensor:
    """A tensor of the captured program, and its value as of some version of its memory."""

    memory: _Memory
    value: Value
    version: int = 0
    base: _Tensor | None = None
    view: Node | None = None
    """The call that made it of its base, and `of`, the call's argument that was the base."""
    of: Node | None = None
    views: list[_Tensor] = field(default_factory=list)


class _Walk:
    """Goes through the program once, in order, and knows what every tensor holds."""

    def __init__(self, gm: GraphModule, shared: dict[Node, Sharing]):
        self.gm, self.shared = gm, shared
        self.tensors: dict[Node, _Tensor] = {}
        self.warned: set[Node] = set()
        self.gone: set[Node] = set()
        """Calls that return a tensor which has a name already."""

    def run(self) -> None:
        nodes = list(self.gm.graph.nodes)
        for node in nodes:
            with self.gm.graph.inserting_before(node):
                self._visit(node)
        for node in reversed(nodes):
            if writes(node) or node in self.gone:
                self.gm.graph.erase_node(node)

    def _visit(self, node: Node) -> None:
        targets = [self.tensors[n] for n in written(node).values()]
        given = {n: self.tensors[n] for n in node.all_input_nodes if n in self.tensors}
        if given:
            values = {n: self._read(tensor) for n, tensor in given.items()}
            arguments = map_aggregate(
                (node.args, node.kwargs), lambda n: values.get(n, n) if isinstance(n, Node) else n
            )
            node.args, node.kwargs = arguments
        if targets and changes_shape(node):
            self._reshape(node, targets[0])
        elif targets:
            self._write(node, targets[0])
        elif node in self.shared:
            bases = [given[n] for n in self.shared[node].inputs]
            self.tensors[node] = self._made(node, bases)

    def _made(self, node: Node, bases: list[_Tensor]) -> _Tensor:
        """The tensor that a call returns, which changes nothing."""
        if not self.shared[node].known:
            for base in bases:
                base.memory.lost = node
            return _Tensor(_Memory(node, lost=node), node)
        if not bases:
            return _Tensor(_Memory(node), node)
        if self.shared[node].same:
            self.gone.add(node)
            return bases[0]
        view = _view(node, bases[0])
        known = self._known(view, bases[0])
        if known is not None:
            self.gone.add(node)
            view.value = known
        bases[0].views.append(view)
        return view

    def _known(self, view: _Tensor, base: _Tensor) -> Value | None:
        """The value of a view just taken, if the same one was taken, or written, before."""
        assert view.view
        if isinstance(base.value, list):
            return again(self.gm, view.view, None, base.value, like=view.view)
        fresh = (other for other in base.views if other.version == view.version and other.view)
        calls = ((other, (other.view, other.of)) for other in fresh)
        return next((t.value for t, made in calls if alike(made, (view.view, view.of))), None)  # type: ignore[arg-type]

    def _read(self, tensor: _Tensor) -> Value:
        """Its value now, computed before the node that is visited."""
        if tensor.version != tensor.memory.version:
            assert tensor.base  # what has none is written itself
            assert tensor.view
            value = self._read(tensor.base)
            tensor.value = again(self.gm, tensor.view, tensor.of, value, like=tensor.view)
            tensor.version = tensor.memory.version
        return tensor.value

    def _reshape(self, node: Node, tensor: _Tensor) -> None:
        """From here on the tensor itself, by all its names, is a view of what it was."""
        if node.target is not aten.detach_.default:
            self._check_write(node, tensor.memory)
        view = _view(_named(view_instead(self.gm, node), node), tensor)
        names = [name for name, known in self.tensors.items() if known is tensor]
        self.tensors |= dict.fromkeys([node, *names], view)

    def _write(self, node: Node, tensor: _Tensor) -> None:
        self._check_write(node, tensor.memory)
        before = _up(tensor, self._read)
        try:
            new = what_is_written(self.gm, node)
            if new is tensor.value:  # `h[0] += 1` puts the sum, which is there, once more
                self.tensors[node] = tensor
                return
            tensor.value = new
            for (view, base), old in before:
                assert view.view
                base.value = scattered(self.gm, view.view, view.of, old, view.value, like=node)
        except (NoCounterpartError, NoInverseError) as error:
            raise _refused(node, f"{error}; use the operation that returns a new tensor") from error
        if new not in node.all_input_nodes:
            _named(new, node)
        tensor.memory.version += 1
        for known in (tensor, *(base for (_, base), _ in before)):
            known.version = tensor.memory.version
        self.tensors[node] = tensor

    def _check_write(self, node: Node, memory: _Memory) -> None:
        origin = memory.origin
        if memory.lost:
            why = f"its memory may be that of {line(memory.lost)}"
            raise _refused(node, f"{why}; write into a copy, .clone()")
        if origin.op == "get_attr":
            raise _refused(
                node,
                f"it is the model's own {origin.target!r}, and a compiled model keeps nothing from "
                "one call to the next; write into a copy, .clone()",
            )
        if origin.op == "placeholder" and origin not in self.warned:
            self.warned.add(origin)
            log.warning("%s: the model writes into its argument %r; compiled, it leaves the "
                        "caller's tensor as it was",
                        source_line(node) or line(node), origin.name)  # fmt: skip


def _view(node: Node, base: _Tensor) -> _Tensor:
    of = base.value if isinstance(base.value, Node) else None
    return _Tensor(base.memory, node, base.memory.version, base, node, of)


def _up(
    tensor: _Tensor, read: Callable[[_Tensor], Value]
) -> list[tuple[tuple[_Tensor, _Tensor], Value]]:
    """((view, its base), the base's value now) from a tensor to the whole that it is a part of."""
    found = []
    while tensor.base:
        found.append(((tensor, tensor.base), read(tensor.base)))
        tensor = tensor.base
    return found


def _named(new: Node, old: Node) -> Node:
    """`new` by the name of `old`, which will go."""
    name = old.name
    old.name = f"{name}_old"
    new.name = name
    return new


def _fill_empty(gm: GraphModule) -> None:
    """Memory that nobody wrote into reads as zeros, in every call."""
    for node in calls(gm, *_ZEROS):
        pure, arguments = _ZEROS[node.target]
        kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "device", "layout")}
        with gm.graph.inserting_before(node):
            new = _named(call(gm, pure, node.args[:arguments], kwargs, like=node), node)
        replace(node, new)


_ZEROS: dict[Any, tuple[Any, int]] = {  # and how many of the arguments
    aten.empty.memory_format: (aten.zeros.default, 1),
    aten.empty_strided.default: (aten.zeros.default, 1),
    aten.empty_permuted.default: (aten.zeros.default, 1),
    aten.empty_like.default: (aten.zeros_like.default, 1),
    aten.new_empty.default: (aten.new_zeros.default, 2),
    aten.new_empty_strided.default: (aten.new_zeros.default, 2),
}


def _draw_as_captured(node: Node) -> None:
    """randn_like(x) gives other numbers where `x` has another dtype, as it will have."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    if is_random(node) and "dtype" in names:
        node.kwargs = {**node.kwargs, "dtype": node.meta["val"].dtype}


def _check(gm: GraphModule, node: Node) -> None:
    """Refuse state that is none of the graph's tensors, and writes into several at once."""
    if is_random(node) and isinstance(node.kwargs.get("generator"), Node):
        raise CaptureError(
            f"{line(node)} ({source_line(node)}) draws from a generator of the model's own, and a "
            "compiled model keeps nothing from one call to the next; draw from torch's "
            "(torch.manual_seed), or take the noise as an argument of forward"
        )
    if writes(node) and len(written(node)) != 1:
        raise _refused(node, "it fills several tensors; use an operation that returns them")
    norm = hidden_write(node)
    if norm is not None:
        raise _refused(
            node,
            f"in training mode it updates {norm.target!r}, and a compiled model keeps nothing from "
            "one call to the next; give it no running mean, or call it with training=False",
        )
    if isinstance(node.target, HigherOrderOperator):
        for part in (n for n in node.all_input_nodes if n.op == "get_attr"):
            _check_part(node, attribute(gm, str(part.target)))


def _check_part(node: Node, part: Any) -> None:
    if not isinstance(part, GraphModule):
        return
    for inner in part.graph.nodes:
        if writes(inner):
            raise _refused(inner, f"it does so inside {node.target}; write outside of it")
        _check(part, inner)


def _refused(node: Node, why: str) -> CaptureError:
    place = source_line(node)
    return CaptureError(
        f"{line(node)}{f' ({place})' if place else ''} writes into a tensor, which cannot be "
        f"compiled here: {why}"
    )
