"""Why every node of a bound graph runs the way it does.

An fxquant operator has a kernel, chosen from a list: each entry was taken, or says why not. What
is left of ATen has a sentence that says why it is no integer operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import FallbackError
from fxquant.graph.dump import line, records
from fxquant.graph.lowered import LAYERS, arguments, is_op, ops
from fxquant.graph.nodes import aten, is_layer, is_symbolic, module_path, note
from fxquant.graph.options import Options
from fxquant.graph.weighted import MOVING, reason_to_stay_float
from fxquant.kernels.dispatch import KERNELS, Choice, Config, TensorInfo, choose, missing
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight

TAKEN = "taken"
SIMULATED = "simulated in float: kernels multiply at most 8 bits"
MOVES = "moves elements"

# What becomes part of an fxquant operator before or after it, where nothing else reads the value.
_JOINS: dict[Any, str] = {
    aten.add.Tensor: "an add joins the layer before it or the quantize after it",
    aten.cat.default: "a concatenation joins the quantize after it",
    aten.silu.default: "a SiLU joins the layer or norm before it or the quantize after it",
    aten.gelu.default: "a GELU joins the layer before it or the quantize after it",
    aten.upsample_nearest2d.vec: "an upsampling by a whole number joins the quantize after it",
    aten.group_norm.default: "a norm joins the quantize after it",
    aten.layer_norm.default: "a norm over the last axis joins the quantize after it",
}
# A word of a fallback's reason, and what to do about it; the last one fits the rest.
_REMEDIES = (
    ("no C++ compiler", "Install a C++ compiler, or point $CXX at one."),
    ("are not built", "The command that a reason names builds them."),
    ("simulated", "Give those layers at most 8 bits, or keep_float."),
    ("stays float", "Name those layers in the recipe's keep_float, if that is what you want."),
    ("", "backend='reference' takes the slow path on purpose; `fxquant doctor` shows the machine."),
)


@dataclass(frozen=True)
class Explanation:
    """How one node runs.

    Attributes:
        node: its name.
        op: "fxquant.conv2d", "aten.silu".
        module: path of the module it came from.
        text: the node in dump syntax.
        precision: "w8a8" of integer layers, "a8" of attention in integers, "to a8" of what writes
            integers, a dtype such as "bfloat16" of what computes in float, "moves elements" of
            what computes nothing.
        kernel: of an fxquant operator, else None.
        considered: every kernel of the operator, best first: "taken", or why it was not.
        reason: why the node is no integer operator; None for fxquant operators.
    """

    node: str
    op: str
    module: str
    text: str
    precision: str
    kernel: str | None
    considered: Mapping[str, str]
    reason: str | None


def explain(gm: GraphModule, options: Options) -> dict[Node, Explanation]:
    """Every node of a graph that select_kernels made, in order."""
    texts = {record["name"]: record["text"] for record in records(gm)}
    return {n: _explain(n, options, texts.get(n.name) or line(n)) for n in gm.graph.nodes}


def _explain(node: Node, options: Options, text: str) -> Explanation:
    fused = is_op(node)
    return Explanation(
        node=node.name,
        op=_op(node),
        module=module_path(node),
        text=text,
        precision=precision(node),
        kernel=str(arguments(node)["kernel"]) if fused else None,
        considered=considered(node, options) if fused else {},
        reason=None if fused else why_float(node),
    )


def choice(node: Node, options: Options) -> Choice:
    """The kernel for a node on the options' machine, and why not the ones before it."""
    return choose(config(node, options), options.backend)


def considered(node: Node, options: Options) -> dict[str, str]:
    """Every kernel of the node's operator, best first: taken, or why not."""
    chosen = choice(node, options)
    later = [k.name for k in KERNELS[config(node, options).op]][len(chosen.reasons) + 1 :]
    not_asked = dict.fromkeys(later, f"not needed: {chosen.kernel} comes before it")
    return {**dict(chosen.reasons), chosen.kernel: TAKEN, **not_asked}


def config(node: Node, options: Options) -> Config:
    """What kernels may ask about a call: tensors by name, the other arguments, the machine."""
    tensors: dict[str, TensorInfo] = {}
    plain = {}
    for name, value in arguments(node).items():
        if isinstance(value, Node):
            tensors[name] = _info(value.meta["val"])
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Node):
            tensors[name] = _info(value[0].meta["val"])
        else:
            plain[name] = value
    if node.target in LAYERS:
        plain["x_bits"] = (note(node, "quant") or {})["input"]["bits"]
    op = str(node.target).split(".")[1]
    return Config(op, tensors, plain, options.machine, options.device)


def _info(value: Tensor) -> TensorInfo:
    return TensorInfo(value.dtype, tuple(s if isinstance(s, int) else None for s in value.shape))


def precision(node: Node) -> str:
    """See Explanation."""
    value = node.meta.get("val")
    if node.target in LAYERS:
        return _bits(node)
    if is_layer(node) and "weight" in (note(node, "quant") or {}):
        return f"{_bits(node)} simulated"
    if node.target is ops.attention.default:
        found = arguments(node)
        return "a8" if found["q_index"] >= 0 else _name(found["q"].meta["val"].dtype)
    if is_op(node) and arguments(node).get("index", -1) >= 0:
        return f"to a{arguments(node)['bits']}"
    if node.op != "call_function" or is_symbolic(node) or node.target in MOVING:
        return MOVES
    return _name(value.dtype) if isinstance(value, Tensor) else MOVES


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(layer: Node) -> str:
    quant = note(layer, "quant")
    return f"w{quant['weight']['bits']}a{quant['input']['bits']}"


def why_float(node: Node) -> str:
    """Why a node that is no fxquant operator is none."""
    if node.op != "call_function" or is_symbolic(node):
        kinds = {"placeholder": "an input", "output": "the result", "get_attr": "a parameter"}
        return kinds.get(node.op, "computes a size")
    noted = reason_to_stay_float(node)
    if noted or is_layer(node):
        return noted or SIMULATED
    if node.target in (fake_quantize, fake_quantize_weight):
        return SIMULATED
    if node.target in MOVING:
        return "moves elements, computes nothing"
    if node.target is aten.to.dtype:
        return "changes the dtype of a float value"
    if note(node, "timestep_only"):
        return "depends on the timestep alone: one row for a whole batch"
    joins = _JOINS.get(node.target)
    if joins is None:
        return f"no fxquant operator does {_op(node)}"
    readers = ", ".join(f"%{user.name}" for user in node.users)
    return f"{joins} if nothing else reads it; this one is read by {readers}"


def _op(node: Node) -> str:
    """fxquant.conv2d, aten.silu, fake_quantize; input, output and get_attr of other nodes."""
    if node.op != "call_function":
        return "input" if node.op == "placeholder" else node.op
    words = str(node.target).split(".")
    known = words[0] in ("aten", "fxquant")
    return ".".join(words[:2]) if known else getattr(node.target, "__name__", str(node.target))


def fallbacks(gm: GraphModule, options: Options) -> dict[str, str]:
    """Nodes that run slower than planned, with the reason.

    The reference, or another fallback, instead of a kernel; layers that the recipe quantises but
    that stay float, or whose integers are only simulated.
    """
    slow: dict[str, str] = {}
    for node in gm.graph.nodes:
        quant = note(node, "quant") or {}
        if is_op(node) and options.backend != "reference":
            chosen = choice(node, options)
            if chosen.is_fallback and chosen.reasons:
                slow[node.name] = "; ".join(f"not {k}: {why}" for k, why in missing(chosen))
        elif is_layer(node) and "weight" in quant:
            slow[node.name] = SIMULATED
        elif reason_to_stay_float(node) and quant.get("unplanned"):
            slow[node.name] = f"stays float: {quant['float']}"
    return slow


def refuse(slow: Mapping[str, str]) -> None:
    """Raise FallbackError if there are fallbacks: what to do, and which for what reason."""
    if not slow:
        return
    nodes: dict[str, list[str]] = {}
    for name, why in slow.items():
        nodes.setdefault(why, []).append(name)
    remedies = (next(cure for word, cure in _REMEDIES if word in why) for why in nodes)
    raise FallbackError(
        f"strict=True, and {len(slow)} operators would not run as planned. "
        + " ".join(dict.fromkeys(remedies))
        + "".join(f"\n  {', '.join(names)}: {why}" for why, names in nodes.items())
    )
