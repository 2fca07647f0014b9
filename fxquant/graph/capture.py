"""A module becomes a plain FX graph of whole ATen operators (conv2d, linear, group_norm, ...).

torch.export does the tracing. Batch, height, width and prompt length stay symbolic; height and
width do not where the model itself has one size, as learned positions give it. What comes back
takes flat tensors, returns one tensor, has no guards, and carries on every node, under
`meta["custom"]["fxquant"]["stack"]`, the path and type of the modules it came from.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.functions import Mod, PythonMod

from fxquant.errors import CaptureError
from fxquant.graph.nodes import write_note
from fxquant.graph.signature import SAMPLE, TIMESTEP, TOKENS, Signature, signature_of

log = logging.getLogger(__name__)

_PREFIX = "model"
_INPUTS_OF_PASSES = ("group", "row")  # which they add behind the call's own
# diffusers' upsampler asks `batch >= 64` before a .contiguous(); both branches compute the same.
# Promising the tracer a smaller batch picks one; the guard-free graph then serves any batch.
_TRACED_BATCH_LIMIT = 63


@dataclass(frozen=True)
class Captured:
    """A float graph and the way calls map to its inputs."""

    graph_module: GraphModule
    signature: Signature


class _FlatCall(nn.Module):
    """forward(*flat tensors) -> the first output tensor of the wrapped module."""

    def __init__(self, model: nn.Module, signature: Signature):
        super().__init__()
        self.model = model
        self._signature = signature

    def forward(self, *tensors: Tensor) -> Tensor:
        kwargs = self._signature.unflatten(tensors)
        if "return_dict" in self._signature.parameters:
            kwargs["return_dict"] = False
        output = self.model(**kwargs)
        return _only_tensor(output)


def _only_tensor(output: Any) -> Tensor:
    values = [output] if isinstance(output, Tensor) else output
    if isinstance(values, tuple | list) and len(values) == 1 and isinstance(values[0], Tensor):
        return values[0]
    count = len(values) if isinstance(values, tuple | list | dict) else 0
    raise CaptureError(
        f"forward returns a {type(output).__name__}"
        + (f" of {count} values" if count else "")
        + "; a denoiser returns one tensor, alone or in a tuple. Wrap the module in one whose "
        "forward returns the tensor you need."
    )


def capture(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """Trace `model` on one example call.

    Args:
        model: any module in eval mode whose forward takes tensors; on any device, meta included.
        args, kwargs: one call; batch size and spatial size are examples, not fixed.

    Raises:
        CaptureError: not a module, or torch.export refuses it.
        CallError: the call does not fit forward.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    signature = signature_of(model, args, kwargs or {})
    example = [
        _traceable(t, n)
        for n, t in zip(signature.names, signature.flatten(args, kwargs or {}), strict=True)
    ]
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        exported = _export(model, signature, example)
    finally:
        for module in training:  # not model.train(), which would reach the frozen ones as well
            module.training = True
    return Captured(_plain(exported, signature), signature)


def _export(
    model: nn.Module, signature: Signature, example: list[Tensor]
) -> torch.export.ExportedProgram:
    wrapper = _FlatCall(model, signature).eval()

    def traced(multiple: int | None) -> torch.export.ExportedProgram:
        shapes = (_dynamic_shapes(signature, example, multiple),)
        with torch.no_grad():
            return torch.export.export(wrapper, tuple(example), dynamic_shapes=shapes, strict=False)

    failure: Exception | None = None
    for multiple in _size_multiples(model, signature):
        try:
            exported = traced(multiple)
            if not _has_one_size(exported):
                return exported
            log.warning("%s takes one height and width only, those of the calibration calls: "
                        "calibrate at the size that you will serve",
                        type(model).__name__)  # fmt: skip
            return traced(None)
        except CaptureError:
            raise
        except Exception as error:  # noqa: BLE001 - any refusal is re-raised as CaptureError below
            failure = failure or error
            log.debug("export with sizes in multiples of %d failed: %s", multiple, error)
    assert failure is not None
    raise CaptureError(_explain(failure, model)) from failure


def _has_one_size(exported: torch.export.ExportedProgram) -> bool:
    """Did the tracer find that heights and widths, or what is made of them, have one value?"""
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    inputs = [value for value in values if isinstance(value, FakeTensor)]
    sides: list[Any] = [side for value in inputs if value.ndim == 4 for side in value.shape[2:]]
    symbols = {
        symbol
        for side in sides
        if isinstance(side, torch.SymInt)
        for symbol in side.node.expr.free_symbols
    }
    environment: Any = inputs[0].fake_mode.shape_env  # export makes one
    equations = [g.expr for g in environment.guards if isinstance(g.expr, sympy.Eq)]
    for equation in equations if symbols else ():
        # Guards may still name what the inputs' symbols have replaced.
        made, value = (environment.replace(side) for side in equation.args)
        is_made_of_sizes = made.free_symbols and made.free_symbols <= symbols
        is_remainder = made.has(Mod, PythonMod)
        if is_made_of_sizes and not is_remainder and value.is_number and value > 0:
            return True
    return False


def _size_multiples(model: nn.Module, signature: Signature) -> tuple[int, ...]:
    """Heights and widths must be a multiple of this for the skips to match."""
    if SAMPLE not in signature.names:
        return (1,)
    config = getattr(model, "config", None)
    levels = getattr(config, "down_block_types", None)
    if levels:
        return (2 ** (len(levels) - 1),)
    return (1, 2, 4, 8, 16)


def _dynamic_shapes(
    signature: Signature, example: list[Tensor], multiple: int | None
) -> tuple[dict[int, Any], ...]:
    """`multiple`: of height and width; None where they are the example's."""
    batch = Dim("batch", max=_TRACED_BATCH_LIMIT)
    height, width, tokens = Dim("height"), Dim("width"), Dim("tokens")
    shapes: list[dict[int, Any]] = []
    for name, tensor in zip(signature.names, example, strict=True):
        dims: dict[int, Any] = {0: batch} if tensor.ndim else {}
        if name in TOKENS and tensor.ndim > 1:
            dims |= {1: tokens}
        elif tensor.ndim == 4 and multiple is not None:
            is_sample = name == SAMPLE
            dims[2] = multiple * height if is_sample else Dim.AUTO
            dims[3] = multiple * width if is_sample else Dim.AUTO
        shapes.append(dims)
    return tuple(shapes)


def _traceable(tensor: Tensor, name: str) -> Tensor:
    """A batch of two: sizes 0 and 1 would be baked in as constants, large ones exceed the limit."""
    if tensor.ndim:
        tensor = tensor[:2] if tensor.shape[0] > 1 else tensor.repeat(2, *[1] * (tensor.ndim - 1))
    if name in TOKENS and tensor.ndim > 1 and tensor.shape[1] == 1:
        tensor = tensor.repeat(1, 2, *[1] * (tensor.ndim - 2))
    return tensor


def _plain(exported: torch.export.ExportedProgram, signature: Signature) -> GraphModule:
    """The exported module without pytrees, hooks and guards, attributes named as in the model."""
    source = exported.module(check_guards=False)
    graph = Graph()
    copies: dict[Node, Node] = {}
    attributes: dict[str, Any] = {}
    placeholders = iter(signature.names)
    for node in source.graph.nodes:
        if node.op == "placeholder":
            copy = _input(graph, next(placeholders))
        elif node.op == "output":
            graph.output(copies[_first_tensor(node)])
            break
        elif node.op == "get_attr":
            target = str(node.target).removeprefix(_PREFIX + ".")
            attributes[target] = _attribute(source, str(node.target))
            copy = graph.create_node("get_attr", target, name=_free(target.replace(".", "_")))
        elif node.op == "call_module":
            continue  # a guards stub; it has no users
        else:
            copy = graph.node_copy(node, copies.__getitem__)
        copies[node] = copy
        copy.meta = {k: node.meta[k] for k in ("val", "stack_trace") if k in node.meta}
        write_note(copy, stack=_stack(node))
    graph.lint()
    return GraphModule(attributes, graph, class_name="Captured")


def _input(graph: Graph, name: str) -> Node:
    """A placeholder for a flat tensor. FX renames what Python or another node is called, so the
    signature goes with the graph by position: only `timestep` keeps its name for certain."""
    word = _free(name.replace(".", "_"))
    node = graph.create_node("placeholder", word, name=word)
    node.target = node.name  # the argument's name, of which there must be one as well
    return node


def _free(name: str) -> str:
    """A node's name that no pass will need."""
    return f"{name}_1" if name in _INPUTS_OF_PASSES else name


def _first_tensor(output: Node) -> Node:
    value = output.args[0]
    while isinstance(value, (tuple, list)):
        value = value[0]
    assert isinstance(value, Node)
    return value


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _stack(node: Node) -> list[list[str]]:
    """[[module path, class name], ...] from the outside in, without the wrapper."""
    entries = node.meta.get("nn_module_stack", {}).values()
    named = [(path, kind if isinstance(kind, str) else kind.__name__) for path, kind in entries]
    return [
        [path.removeprefix(_PREFIX).removeprefix("."), kind.rpartition(".")[2]]
        for path, kind in named
        if path.startswith(_PREFIX)
    ]


def _explain(error: Exception, model: nn.Module) -> str:
    paths = {id(m): p for p, m in model.named_modules()}
    place, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        code, owner = frame.f_code, frame.f_locals.get("self")
        if id(owner) in paths and "torch" not in Path(code.co_filename).parts:
            place = f"{paths[id(owner)] or '(root)'} ({type(owner).__name__})"
            line = f"{Path(code.co_filename).name}:{number} in {code.co_name}"
    reason = str(error).strip().split("\n\n")[0][:600]
    return (
        f"torch.export could not trace {type(model).__name__}"
        + (f" in module {place}, {line}" if place else "")
        + f": {type(error).__name__}: {reason}\nA module is captured whole: its forward may not "
        "branch on tensor values or leave torch. Rewrite that line, or compile the submodule that "
        "can be traced."
    )


__all__ = ["TIMESTEP", "Captured", "capture"]
