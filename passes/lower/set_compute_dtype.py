"""Give everything that stays float the dtype it computes in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph import tolerance
from fxquant.graph.casts import Casts, float_dtype, set_dtype, simplify
from fxquant.graph.lowered import OPERANDS, is_op, is_operand, roles
from fxquant.graph.nodes import (
    CONV2D,
    aten,
    attribute,
    get_attr,
    refresh,
    set_buffer,
)
from fxquant.graph.options import Options
from fxquant.graph.precision import compute_dtypes
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight

Dtypes = Mapping[Node, torch.dtype]
ParameterEdge = tuple[Node, Node]  # the get_attr, and a reader
Operands = tuple[torch.dtype, ...]  # what kernels of fxquant operators read


def set_compute_dtype(gm: GraphModule, *, options: Options) -> GraphModule:
    """What `fxquant.graph.precision` decides: parameters are cast now, values where they are read.

    Parameters of norms stay float32, as their kernels read them; simulated layers compute in
    float32. The graph's result returns to the model's dtype.

        %sin: f32[...] = sin(%timesteps)
        %linear: f32[...] = linear(%sin, time.weight, time.bias)
        %conv2d_1: f32[...] = fxquant.conv2d(%fq_0, ..., f32)
    becomes
        %sin: f32[...] = sin(%timesteps)
        %to: bf16[...] = to(%sin, bf16)
        %linear: bf16[...] = linear(%to, time.weight, time.bias)
        %conv2d_1: bf16[...] = fxquant.conv2d(%fq_0, ..., bf16)
    """
    compute = options.compute_dtype
    output = next(n for n in gm.graph.nodes if n.op == "output")
    results = {n: n.meta["val"].dtype for n in output.all_input_nodes if float_dtype(n)}
    dtypes = compute_dtypes(gm, compute)
    operands = (torch.float32, compute)
    _cast_parameters(gm, dtypes)
    casts = Casts(gm)
    stale: set[Node] = {n for n in gm.graph.nodes if n.op == "get_attr"}
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            changed = node in dtypes and _apply(node, dtypes, casts, operands)
            if changed or any(n in stale for n in node.all_input_nodes):
                stale.add(node)
                refresh(gm, node)
                _insist(gm, node, dtypes.get(node, compute))
    final = {n: casts.of(n, dtype) for n, dtype in results.items()}
    output.args = map_arg(output.args, lambda n: final.get(n, n))
    simplify(gm, operands)
    return gm


def _apply(node: Node, dtypes: Dtypes, casts: Casts, operands: Operands) -> bool:
    """Make a call compute in its dtype; did that change it?"""
    changed = False
    for value in list(node.all_input_nodes):
        wanted = _wanted(node, value, dtypes, operands)
        cast = casts.of(value, wanted) if wanted else value
        if cast is not value:
            node.replace_input_with(value, cast)
            changed = True
    return _write(node, dtypes[node]) or changed


def _wanted(node: Node, value: Node, dtypes: Dtypes, operands: Operands) -> torch.dtype | None:
    """In what dtype a call reads one of its values; None for any."""
    if float_dtype(value) is None or node.target is fake_quantize_weight:
        return None
    if node.target is fake_quantize:
        return torch.float32 if value is node.args[0] else None
    if is_op(node):
        return _operand(node, value, dtypes, operands)
    if tolerance.is_creation(node) or (tolerance.is_conversion(node) and float_dtype(node)):
        return None
    return dtypes[node]


def _operand(node: Node, value: Node, dtypes: Dtypes, operands: Operands) -> torch.dtype | None:
    """The same for an fxquant operator: kernels take operands in several dtypes."""
    if not is_operand(node, value):
        return None
    if not roles(node, value) & OPERANDS:  # q, k and v have one dtype
        return dtypes[node]
    wanted = dtypes[value] if value.op == "placeholder" else float_dtype(value)
    return wanted if wanted in operands else torch.float32


def _write(node: Node, dtype: torch.dtype) -> bool:
    """Set the dtype that a call says it writes, if it writes floats."""
    if float_dtype(node) is None or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in (aten.type_as.default, aten.to.other):
        node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], dtype), {}
        return True
    if is_op(node) or tolerance.is_conversion(node) or _names_a_dtype(node):
        return set_dtype(node, dtype)
    return False


def _names_a_dtype(node: Node) -> bool:
    given = (*node.args, *node.kwargs.values())
    return any(isinstance(value, torch.dtype) for value in given)


def _insist(gm: GraphModule, node: Node, dtype: torch.dtype) -> None:
    """Name the dtype where torch's default is another."""
    if tolerance.is_creation(node) and float_dtype(node) not in (None, dtype):
        set_dtype(node, dtype)
        refresh(gm, node)


def _cast_parameters(gm: GraphModule, dtypes: Dtypes) -> None:
    """Bind parameters and constants in the dtype that they are read in.

    Where readers differ, each dtype but the parameter's own gets a copy.
    """
    for target, edges in _parameter_edges(gm).items():
        readers: dict[torch.dtype | None, list[ParameterEdge]] = {}
        for node, user in edges:
            own = attribute(gm, target).dtype
            wanted = _wanted(user, node, dtypes, (own, torch.float32)) if user in dtypes else None
            readers.setdefault(wanted, []).append((node, user))
        for dtype, found in readers.items():
            if dtype is not None:
                _bind(gm, target, dtype, found, shared=len(readers) > 1)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            refresh(gm, node)


def _parameter_edges(gm: GraphModule) -> dict[str, list[ParameterEdge]]:
    """Who reads each float parameter."""
    found: dict[str, list[ParameterEdge]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and float_dtype(node):
            found.setdefault(str(node.target), []).extend((node, user) for user in node.users)
    return found


def _bind(
    gm: GraphModule,
    target: str,
    dtype: torch.dtype,
    edges: list[ParameterEdge],
    shared: bool,
) -> None:
    value: Tensor = attribute(gm, target).detach()
    if value.dtype == dtype and shared:
        return
    cast = value.to(dtype)
    if value.ndim == 4 and any(user.target is CONV2D for _, user in edges):
        cast = cast.contiguous(memory_format=torch.channels_last)
    if not shared:
        set_buffer(gm, target, cast)
        return
    name = set_buffer(gm, f"{target}_{str(dtype).removeprefix('torch.')}", cast)
    for node, user in edges:
        with gm.graph.inserting_after(node):
            copy = get_attr(gm, name, like=node)
        user.replace_input_with(node, copy)
