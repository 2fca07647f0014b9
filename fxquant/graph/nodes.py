"""Small helpers over FX nodes: notes, attributes, values, inserting calls.

fxquant's own metadata are *notes* under `node.meta["custom"]["fxquant"]`, plain JSON-able values:
    stack          [[module path, class name], ...], outside in (written by capture)
    timestep_only  True where nothing but the timestep is read (mark_timestep_only)
    quant          {"input": spec, "weight": spec} or {"float": reason} on layers, {"q": spec, "k":
                   spec, "v": spec} on attention (annotate)
    unit           [module path, class name] of the reconstruction unit (group_units)
    source         name of the fake-quant node whose value a lowered node computes (lower)
Notes are rebound, never edited in place: clones of a graph share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

CONV2D, LINEAR = aten.conv2d.default, aten.linear.default
SDPA = aten.scaled_dot_product_attention.default
# Operators that move or drop elements but never change or add one: a per-tensor quantiser
# commutes with them.
LAYOUT = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.contiguous.default,
        aten.expand.default,
    }
)
PAD = aten.pad.default
CONSTANTS = "constants."  # prefix of the buffers that fold_constants makes
CONSTANT_PAD = aten.constant_pad_nd.default


def note(node: Node, key: str, default: Any = None) -> Any:
    """One of the node's notes."""
    return node.meta.get("custom", {}).get("fxquant", {}).get(key, default)


def write_note(node: Node, **changes: Any) -> None:
    """Set notes; None removes one. Rebinds the dictionaries, which clones share."""
    custom = node.meta.get("custom", {})
    merged = {**custom.get("fxquant", {}), **changes}
    kept = {k: v for k, v in merged.items() if v is not None}
    node.meta["custom"] = {**custom, "fxquant": kept}


def module_path(node: Node) -> str:
    """Path of the innermost module the node came from, '' at the root."""
    stack = note(node, "stack") or [["", ""]]
    return str(stack[-1][0])


def is_layer(node: Node) -> bool:
    """Is it a conv2d or linear call?"""
    return node.op == "call_function" and node.target in (CONV2D, LINEAR)


def is_attention(node: Node) -> bool:
    """Is it attention as denoisers use it: [B, heads, tokens, d] without dropout or causal mask?"""
    if node.op != "call_function" or node.target is not SDPA:
        return False
    sizes = [[str(s) for s in n.meta["val"].shape] for n in node.args[:3] if isinstance(n, Node)]
    if any(len(s) != 4 or s[:2] != sizes[0][:2] for s in sizes):
        return False
    dropout, causal = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)
    return not (dropout or causal or node.kwargs.get("enable_gqa"))


def calls(gm: GraphModule, *targets: Any) -> Iterator[Node]:
    """The graph's call_function nodes with one of these targets, in order."""
    return (n for n in list(gm.graph.nodes) if n.op == "call_function" and n.target in targets)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An ATen argument wherever it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def attribute(gm: nn.Module, target: str) -> Any:
    """The tensor or module that a dotted get_attr target names."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def set_buffer(gm: GraphModule, target: str, value: Tensor) -> str:
    """Bind a tensor at a dotted name of this graph module only (clones keep theirs)."""
    owner, leaf = _owner(gm, target)
    if leaf in owner._parameters:
        del owner._parameters[leaf]
    owner.register_buffer(leaf, value)
    return target


def set_parameter(gm: GraphModule, target: str, value: Tensor) -> str:
    """The same for what is learned: is_learned tells it from a buffer."""
    owner, leaf = _owner(gm, target)
    owner._buffers.pop(leaf, None)
    owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
    return target


def _owner(gm: GraphModule, target: str) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, made where it is missing, and the name in it."""
    owner: nn.Module = gm
    *path, leaf = target.split(".")
    for part in path:
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    return owner, leaf


def free_target(gm: GraphModule, wanted: str) -> str:
    """The dotted name, or the first of name_2, name_3, ... that nothing is bound at."""
    target, number = wanted, 2
    while _is_bound(gm, target):
        target, number = f"{wanted}_{number}", number + 1
    return target


def _is_bound(gm: GraphModule, target: str) -> bool:
    """Is there anything at the name, or a tensor where a module must be on the way to it?"""
    value: Any = gm
    for part in target.split("."):
        if isinstance(value, Tensor):
            return True
        if not hasattr(value, part):
            return hasattr(nn.Module, target.rpartition(".")[2])  # as a new owner of it will be
        value = getattr(value, part)
    return True


def is_learned(gm: GraphModule, node: Node) -> bool:
    """Does the node read a parameter of the model, or what was folded from some?"""
    return node.op == "get_attr" and isinstance(attribute(gm, str(node.target)), nn.Parameter)


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The mode that the graph's example values live in."""
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise AssertionError("graph without example values")


def get_attr(gm: GraphModule, target: str, like: Node) -> Node:
    """A get_attr node at the current insertion point, with value and notes of `like`."""
    node = gm.graph.get_attr(target)
    node.meta = {"custom": like.meta.get("custom", {})}
    refresh(gm, node)
    return node


def call(
    gm: GraphModule,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: Node,
) -> Node:
    """A call_function node at the insertion point, its value computed, with the notes of `like`."""
    node = gm.graph.call_function(target, args, dict(kwargs or {}))
    node.meta = {k: like.meta[k] for k in ("custom", "stack_trace") if k in like.meta}
    refresh(gm, node)
    return node


def refresh(gm: GraphModule, node: Node) -> None:
    """Recompute the node's example value from those of its inputs."""
    if node.op in ("placeholder", "output") or is_symbolic(node):
        return  # sizes survive every rewrite; asking for them again would bake in their example
    mode = fake_mode(gm)
    if node.op == "get_attr":
        value = attribute(gm, str(node.target))
        node.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
        return
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if node.op == "call_module":  # an observer, which returns its input
        node.meta["val"] = args[0]
        return
    assert callable(node.target)
    if getattr(node.target, "keeps_outline", False):
        node.meta["val"] = args[0]
        return
    # without the Python dispatcher, composite C++ operators would turn symbolic sizes into numbers
    with mode, enable_python_dispatcher(), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)


def refresh_after(gm: GraphModule, start: Iterable[Node]) -> None:
    """Recompute the example values of what depends on `start`, as far as they change."""
    first = set(start)
    stale = set(first)
    for node in gm.graph.nodes:
        if node in stale or any(i in stale for i in node.all_input_nodes):
            before = node.meta.get("val")
            refresh(gm, node)
            if node in first or not _is_alike(before, node.meta.get("val")):
                stale.add(node)


def _is_alike(a: Any, b: Any) -> bool:
    """Have two example values the same dtypes, shapes and memory order?"""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _outline(a) == _outline(b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return all(map(_is_alike, a, b))
    return a is b


def _outline(value: Tensor) -> tuple[object, ...]:
    sizes = [*value.shape, *(value.stride() if value.layout == torch.strided else ())]
    return value.dtype, value.device, value.layout, *map(str, sizes)


def shape(node: Node) -> tuple[Any, ...]:
    """The example value's shape, ints and SymInts."""
    return tuple(node.meta["val"].shape)


def counts_samples(gm: GraphModule, size: Any) -> bool:
    """Does a size grow with the batch of the first input?"""
    first = next(n for n in gm.graph.nodes if n.op == "placeholder")
    batch = shape(first)[0] if shape(first) else 1
    if not isinstance(size, torch.SymInt) or not isinstance(batch, torch.SymInt):
        return False
    return bool(size.node.expr.free_symbols & batch.node.expr.free_symbols)


def only_user(node: Node) -> Node | None:
    """The single user, None if there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def replace(old: Node, new: Node) -> None:
    """All users of `old` read `new`; `old` goes."""
    old.replace_all_uses_with(new, propagate_meta=False)
    old.graph.erase_node(old)


def is_random(node: Node) -> bool:
    """Does a call draw new numbers: is its value no function of its inputs?"""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    told = defaults | given
    if told.get("train", True) is False or told.get("training", True) is False:
        return False  # dropout and rrelu, recurrent layers
    chance = told.get("p", 1) if "dropout" in schema.name else 1
    return bool(told.get("dropout_p", told.get("dropout", chance)))


def is_symbolic(node: Node) -> bool:
    """Is the node a size computation (a number or a condition, not a tensor)?"""
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(node.meta.get("val"), numbers)
