"""One text form of a graph, for people, goldens, errors and logs.

    # unit down_blocks.0.resnets.0  ResnetBlock2D
      %conv2d_1: f32[Bx32x8hx8w] = conv2d(%silu:u8/t, down.0.conv1.weight:i8/c0, ...)

dtype[shape], inputs with the spec of the quantised edge (u8/t: 8 bit, affine, per tensor; i8/c0:
symmetric, per channel of axis 0), weights and sizes folded into their user. Symbolic sizes: B
batch, h and w the free factors of height and width, L prompt length. No addresses, no paths, no
calibrated numbers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.edges import quantised_edges
from fxquant.graph.nodes import is_layer, is_symbolic, note
from fxquant.quant.spec import QuantSpec

_DTYPES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64",
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "bool",
}  # fmt: skip


def dump(gm: GraphModule, unit: str | None = None) -> str:
    """The graph as text, one line a node.

    Args:
        unit: only the nodes of the unit or module path that starts with this.
    """
    symbols = _symbols(gm)
    lines: list[str] = []
    section: Any = None
    for node in shown_nodes(gm):
        place = _place(node)
        if unit and not _inside(node, unit):
            continue
        if place != section:
            section = place
            lines.append(f"# {place[0]}  {place[1]}" if place else "# -")
        lines.append("  " + line(node, symbols))
    return "\n".join(lines) + "\n"


def records(gm: GraphModule, unit: str | None = None) -> list[dict[str, Any]]:
    """The same as plain data, for --json."""
    symbols = _symbols(gm)
    rows = []
    for node in shown_nodes(gm):
        if unit and not _inside(node, unit):
            continue
        rows.append(
            {
                "name": node.name,
                "op": _target(node),
                "value": _value(node, symbols),
                "inputs": [n.name for n in node.all_input_nodes],
                "text": line(node, symbols),
                "notes": {
                    k: v
                    for k, v in node.meta.get("custom", {}).get("fxquant", {}).items()
                    if k != "stack"
                },
            }
        )
    return rows


def diff(before: str, after: str, names: tuple[str, str] = ("before", "after")) -> str:
    """Unified diff of two dumps, '' when equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=2)
    text = "\n".join(lines)
    return text + "\n" if text else ""


def line(node: Node, symbols: dict[str, str] | None = None) -> str:
    """One node in dump syntax."""
    symbols = symbols or {}
    if node.op == "output":
        return f"return {_argument(node.args[0], symbols)}"
    head = f"%{node.name}: {_value(node, symbols)} = "
    if node.op == "placeholder":
        return head + "input"
    marks = "  # timestep only" if note(node, "timestep_only") else ""
    return f"{head}{_target(node)}({', '.join(_arguments(node, symbols))}){marks}"


def shown_nodes(gm: GraphModule) -> Iterator[Node]:
    """Nodes with a line of their own: no attributes, no size computations."""
    return (n for n in gm.graph.nodes if n.op != "get_attr" and not is_symbolic(n))


def _place(node: Node) -> tuple[str, str] | None:
    """The reconstruction unit if there is one, else the enclosing module."""
    unit = note(node, "unit")
    if unit:
        return f"unit {unit[0]}", unit[1]
    stack = note(node, "stack")
    if not stack or node.op in ("placeholder", "output"):
        return None
    return stack[-1][0] or "(root)", stack[-1][1]


def _inside(node: Node, prefix: str) -> bool:
    place = _place(node)
    return place is not None and place[0].removeprefix("unit ").startswith(prefix)


def _arguments(node: Node, symbols: dict[str, str]) -> Iterator[str]:
    quant = note(node, "quant") or {}
    if str(node.target).startswith("fxquant."):
        yield from _fxquant_arguments(node, quant, symbols)
        return
    specs = {e.position: e.spec for e in quantised_edges(node)}
    if is_layer(node):
        specs[1] = quant.get("weight")
    for position, value in enumerate(node.args):
        spec = specs.get(position)
        yield _argument(value, symbols) + (f":{QuantSpec.from_json(spec)}" if spec else "")
    for name, value in node.kwargs.items():
        if name not in ("device", "pin_memory", "layout"):
            yield f"{name}={_argument(value, symbols)}"


def _fxquant_arguments(node: Node, quant: dict[str, Any], symbols: dict[str, str]) -> Iterator[str]:
    """Operands in place, everything else by name; what is absent or neutral is left out."""
    values = dict(zip(_schema(node), node.args, strict=True))
    specs = {"x": quant.get("input"), **{name: quant.get(name) for name in ("weight", *"qkv")}}
    hidden = {"weight_scale"} | {
        name for name, value in values.items() if value in (None, "none", "")
    }
    hidden |= {name for name in ("stride", "dilation") if values.get(name) == [1, 1]}
    hidden |= {name for name in ("q_index", "k_index", "v_index") if values.get(name) == -1}
    hidden |= {"groups"} if "stride" in values and values["groups"] == 1 else set()
    for index, bits in (("index", "bits"), ("out_index", "out_bits")):
        if values.get(index, 0) == -1:
            hidden |= {index, bits}
    for name, value in values.items():
        if name in hidden:
            continue
        spec = specs.get(name)
        text = _argument(value, symbols) + (f":{QuantSpec.from_json(spec)}" if spec else "")
        yield text if name in _OPERANDS else f"{name}={text}"


_OPERANDS = frozenset({"x", "xs", "a", "b", "q", "k", "v", "row", "weight"})


def _schema(node: Node) -> list[str]:
    return [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]


def _argument(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, Node):
        if value.op == "get_attr":
            return str(value.target)
        return _expression(value.meta["val"], symbols) if is_symbolic(value) else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v, symbols) for v in value) + "]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    if isinstance(value, float):
        return f"{value:g}"
    if value == 2**63 - 1:  # "to the end" in a slice
        return "end"
    return str(value)


def _target(node: Node) -> str:
    if node.op == "call_module":
        return "observe"
    target = node.target
    name = (
        target
        if isinstance(target, str)
        else getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    )
    return f"fxquant.{name}" if str(target).startswith("fxquant.") else str(name)


def _value(node: Node, symbols: dict[str, str]) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        dims = "x".join(_expression(s, symbols) for s in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{dims}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_value_of(v, symbols) for v in value) + ")"
    return type(value).__name__


def _value_of(value: Any, symbols: dict[str, str]) -> str:
    dims = "x".join(_expression(s, symbols) for s in value.shape)
    return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{dims}]"


def _expression(size: Any, symbols: dict[str, str]) -> str:
    """8*s12 -> 8h: symbols renamed, products without the star."""
    text = str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)
    text = re.sub(r"\bs\d+\b", lambda m: symbols.get(m.group(), m.group()), text)
    text = re.sub(r"(\d)\*([A-Za-z])", r"\1\2", text)
    return text if re.fullmatch(r"\w+", text) else f"({text})".replace(" ", "")


def _symbols(gm: GraphModule) -> dict[str, str]:
    """Tracer symbols (s12) by their meaning, from the inputs' shapes."""
    names: dict[str, str] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        letters = "BChw" if value.ndim == 4 else "BLC"
        for size, letter in zip(value.shape, letters, strict=False):
            for symbol in re.findall(r"\bs\d+\b", str(size)):
                names.setdefault(symbol, letter)
    return names
