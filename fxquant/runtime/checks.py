"""What every call of an operator in a saved graph must satisfy before it may run.

Kernels trust their arguments: a quantiser index beyond the table or a weight of another shape would
have them read what is not theirs. compile() cannot make such a graph; a file can.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.errors import ArtifactError
from fxquant.graph.lowered import is_op
from fxquant.graph.nodes import aten, note
from fxquant.kernels.reference import GATED
from fxquant.runtime import operators
from fxquant.runtime.vocabulary import is_size

_INTEGERS = (torch.int8, torch.uint8)
_ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", *GATED)
_OPTIONAL = ("q_index", "k_index", "v_index", "out_index")
_FLOAT_OUTPUT = ("linear", "conv2d", "group_norm_silu_quantize", "layer_norm_quantize")
_LARGEST = 1 << 16  # of strides, paddings and the like
_TRANSFORMS = (aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default)
_SIZE_FUNCTIONS = frozenset(operators.SIZES.values())
_POWERS = (operator.pow, operator.lshift)
_MOST_POWER = 64
_MOST_DEGREE = 256  # of sizes as polynomials of the inputs': no denoiser's is above four


def check_call(node: Node, rows: int) -> None:
    """Look at a node whose inputs have their example values.

    Args:
        rows: n, the number of activation quantisers in a row of the table.

    Raises:
        ArtifactError: says what is wrong with the call, without the file and field.
    """
    if is_op(node):
        Call(node, rows).check()
    elif node.target in _SIZE_FUNCTIONS:
        _check_size(node)
    elif node.target is operators.named(operators.GETITEM):
        _check_item(node)
    elif not isinstance(node.target, torch._ops.OpOverload):
        _require(rows > 0 and len(node.args) >= 3, "is a simulation without its arguments")
    elif node.target in _TRANSFORMS:
        _check_transform(node)
    elif operators.returns_lists(node.target):
        values = (n.meta["val"] for n in node.all_input_nodes)
        sides = [side for v in values if isinstance(v, Tensor) for side in v.shape]
        fits = all(_example(side) <= _LARGEST for side in sides)
        _require(fits, f"may give more than {_LARGEST} tensors")


def _check_transform(node: Node) -> None:
    """The kernels of Fourier transforms believe that their dimensions exist."""
    _require(len(node.args) == 4 and not node.kwargs, "takes four arguments")
    dims: Any = node.args[1]
    value, norm = _value(node.args[0]), node.args[2]
    _require(value is not None and isinstance(dims, (list, tuple)), "transforms no dimensions")
    assert value is not None
    fits = all(type(dim) is int and 0 <= dim < value.ndim for dim in dims)
    _require(fits and len(set(dims)) == len(dims), "transforms dimensions that are not there")
    _require(type(norm) is int and 0 <= norm <= 2, "has an unknown normalisation")


def _example(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _check_size(node: Node) -> None:
    """Python would compute a power of a power of a size for as long as memory lasts."""
    _require(not node.kwargs and 0 < len(node.args) <= 3, "takes one to three numbers")
    only, *others = node.args
    is_list = isinstance(only, (list, tuple)) and not others
    args: Any = only if is_list else node.args
    if node.target is round and args[1:] == (None,):
        args = args[:1]
    _require(all(map(is_size, args)), "computes with something that is no size")
    degrees = [n.meta.get("degree", 1) for n in args if isinstance(n, Node)]
    degree = max(degrees, default=0)
    if node.target is operator.mul:
        degree = sum(degrees)
    elif node.target in _POWERS:
        exponent, shifts = args[-1], node.target is operator.lshift
        least = 0 if shifts else -_MOST_POWER  # a negative power is a fraction, and no larger
        fits = not isinstance(exponent, Node) and least <= exponent <= _MOST_POWER
        _require(fits, f"has an exponent that is none from {least} to {_MOST_POWER}")
        degree = degree + exponent if shifts else degree * math.ceil(abs(exponent))
    _require(degree <= _MOST_DEGREE, "computes a size that is too large")
    node.meta["degree"] = degree


def _check_item(node: Node) -> None:
    _require(len(node.args) == 2 and not node.kwargs, "takes a list and an index")
    source, index = node.args
    items: Any = source.meta["val"] if isinstance(source, Node) else None
    _require(isinstance(items, (list, tuple)), "takes an item of something that is no list")
    _require(type(index) is int and 0 <= index < len(items), "takes an item that is not there")


class Call:
    """A call of an fxquant operator with its arguments by name."""

    def __init__(self, node: Node, rows: int):
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        _require(len(node.args) == len(names) and not node.kwargs, f"takes {len(names)} arguments")
        self.op = str(node.target).split(".")[1]
        self.node = node
        self.rows = rows
        self.arguments = dict(zip(names, node.args, strict=True))

    def check(self) -> None:
        """Everything, in the order in which later checks rely on earlier ones."""
        _require(self.arguments["kernel"] == "reference", "names another kernel than the reference")
        if "row" in self.arguments:
            row = self.arguments["row"]
            _require(isinstance(row, Node) and row.name == "row", "does not read the input 'row'")
            self._check_quantisers()
        if self.arguments.get("activation", "none") not in _ACTIVATIONS:
            raise ArtifactError("names an unknown activation")
        _SPECIFIC.get(self.op, _no_more)(self)

    def _check_quantisers(self) -> None:
        for name in ("x_index", "q_index", "k_index", "v_index", "index", "out_index"):
            if name in self.arguments:
                optional = name in _OPTIONAL or (name == "index" and self.op in _FLOAT_OUTPUT)
                self.integer(name, -1 if optional else 0, self.rows - 1)
        for name in ("bits", "out_bits", "weight_bits"):
            if name in self.arguments:
                self.integer(name, 2, 8)
        dtype: Any = self.arguments.get("out_dtype", self.arguments.get("dtype"))
        _require(isinstance(dtype, torch.dtype), "has no dtype")
        index: Any = self.arguments.get("out_index", self.arguments.get("index"))
        quantised = index >= 0
        fits = dtype in _INTEGERS if quantised else dtype.is_floating_point
        _require(fits, f"cannot write {dtype}")

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer argument in [low, high]."""
        value = self.arguments[name]
        ok = type(value) is int and low <= value <= high
        _require(ok, f"{name} is not an integer from {low} to {high}")
        return value

    def integers(self, name: str, count: int, low: int) -> list[int]:
        """A list of integers."""
        values = self.arguments[name]
        ok = isinstance(values, (list, tuple)) and len(values) == count
        ok = ok and all(type(v) is int and low <= v <= _LARGEST for v in values)
        _require(ok, f"{name} is not {count} integers from {low}")
        return list(values)

    def tensor(self, name: str, integers: bool = False, ranks: tuple[int, ...] = ()) -> Tensor:
        """The example value of a tensor argument, float unless `integers`."""
        value: Any = _value(self.arguments[name])
        _require(value is not None, f"{name} is no tensor")
        fits = value.dtype in _INTEGERS if integers else value.dtype.is_floating_point
        _require(fits, f"{name} is {value.dtype}")
        _require(not ranks or value.ndim in ranks, f"{name} has {value.ndim} dimensions")
        return value

    def vector(self, name: str, length: Any) -> None:
        """A float tensor [length], or None."""
        if self.arguments[name] is not None:
            _require(
                _same(self.tensor(name).shape, (length,)), f"{name} is not of shape [{length}]"
            )


def _no_more(call: Call) -> None:
    if "x" in call.arguments:
        call.tensor("x")


def _linear(call: Call) -> None:
    x = call.tensor("x", integers=True)
    _require(x.ndim >= 1, "x has no dimension")
    outputs = _check_weight(call, (_number(x.shape[-1]),))
    if call.arguments["activation"] in GATED:
        _require(outputs % 2 == 0, "the weight has no halves")
        _require(call.arguments["residual"] is None, "a GEGLU takes no residual")
        outputs //= 2
    _check_end(call, (*x.shape[:-1], outputs))


def _conv2d(call: Call) -> None:
    x = call.tensor("x", integers=True, ranks=(4,))
    _require(call.arguments["activation"] not in GATED, "a convolution has no GEGLU")
    groups = call.integer("groups", 1, _LARGEST)
    window = call.integers("kernel_size", 2, 1)
    stride, dilation = call.integers("stride", 2, 1), call.integers("dilation", 2, 1)
    top, bottom, left, right = call.integers("padding", 4, 0)
    channels = _number(x.shape[1])
    _require(channels % groups == 0, "groups do not divide x")
    outputs = _check_weight(call, (channels // groups, *window))
    _require(outputs % groups == 0, "groups do not divide the weight")
    if call.arguments["channel_add"] is not None:
        added = call.tensor("channel_add", ranks=(2,))
        fits = added.shape[0] == 1 or bool(added.shape[0] == x.shape[0])
        _require(fits and _same(added.shape[1:], (outputs,)), "channel_add is not [B, N]")
    sizes = [
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, before, after, d, k, s in zip(
            x.shape[2:], (top, left), (bottom, right), dilation, window, stride, strict=True
        )
    ]
    _require(all(bool(size > 0) for size in sizes), "the window is larger than the image")
    _check_end(call, (x.shape[0], outputs, *sizes))


def _number(size: Any) -> int:
    """What a size is that a weight fixes. It may be written with sizes that calls choose,
    `h // (h // 2)`: kernels ask again whether it is what their weight wants."""
    _require(isinstance(size, int) or size.node.has_hint(), "the weight's size is not fixed")
    return int(size)


def _check_weight(call: Call, shape: tuple[int, ...]) -> int:
    """Weight, scale and bias for inputs of `shape`; returns the number of outputs."""
    bits = call.integer("weight_bits", 2, 8)
    weight, scale = call.tensor("weight", integers=True), call.tensor("weight_scale", ranks=(1,))
    columns = 1
    for size in shape:
        columns *= size
    stored = shape if bits > 4 else ((columns + 1) // 2,)
    dtype = torch.int8 if bits > 4 else torch.uint8
    fits = weight.dtype == dtype and _same(weight.shape[1:], stored) and weight.ndim > 1
    _require(fits, f"the weight is not {dtype} [N, {', '.join(map(str, stored))}]")
    outputs = int(weight.shape[0])
    _require(scale.dtype == torch.float32, "weight_scale is not float32")
    call.vector("weight_scale", outputs)
    call.vector("bias", outputs)
    return outputs


def _check_end(call: Call, shape: tuple[Any, ...]) -> None:
    """The residual, and the specification that a summary prints."""
    if call.arguments["residual"] is not None:
        fits = _same(call.tensor("residual").shape, shape)
        _require(fits, "the residual is not of the result's shape")
    quant = note(call.node, "quant") or {}
    _require({"input", "weight"} <= set(quant), "lacks the note of its specification")


def _group_norm(call: Call) -> None:
    x = call.tensor("x")
    _require(x.ndim >= 3, "x has fewer than three dimensions")
    groups = call.integer("groups", 1, _LARGEST)
    _require(isinstance(x.shape[1], int) and x.shape[1] % groups == 0, "groups do not divide x")
    _require(call.arguments["activation"] in ("none", "silu"), "has neither silu nor no activation")
    _require(isinstance(call.arguments["eps"], (int, float)), "eps is no number")
    call.vector("weight", x.shape[1])
    call.vector("bias", x.shape[1])


def _layer_norm(call: Call) -> None:
    x = call.tensor("x")
    _require(x.ndim >= 1, "x has no dimension")
    _require(isinstance(call.arguments["eps"], (int, float)), "eps is no number")
    call.vector("weight", x.shape[-1])
    call.vector("bias", x.shape[-1])


def _geglu(call: Call) -> None:
    width = call.tensor("x").shape[-1:]
    _require(len(width) == 1 and bool(width[0] % 2 == 0), "x has no halves")
    _require(call.arguments["approximate"] in ("none", "tanh"), "names an unknown approximation")


def _cat(call: Call) -> None:
    nodes = call.arguments["xs"]
    _require(isinstance(nodes, (list, tuple)) and len(nodes) > 0, "joins nothing")
    values = [_value(node) for node in nodes]
    first = values[0]
    _require(first is not None, "joins something that is no tensor")
    assert first is not None
    dim = call.integer("dim", -first.ndim, first.ndim - 1) % first.ndim
    for value in values:
        ok = value is not None and value.dtype.is_floating_point and value.ndim == first.ndim
        _require(ok, "joins tensors of different kinds")
        assert value is not None
        rest = [_without(v.shape, dim) for v in (value, first)]
        _require(_same(*rest), "joins tensors of different sizes")


def _upsample(call: Call) -> None:
    call.tensor("x", ranks=(4,))
    call.integer("factor", 1, 64)


def _add(call: Call) -> None:
    _require(_same(call.tensor("a").shape, call.tensor("b").shape), "adds different shapes")


def _attention(call: Call) -> None:
    integers = call.arguments["q_index"] >= 0
    q, k, v = (call.tensor(name, integers, ranks=(4,)) for name in "qkv")
    _require(q.dtype == k.dtype == v.dtype, "mixes dtypes")
    for name in ("k_index", "v_index"):
        _require((call.arguments[name] >= 0) == integers, "mixes floats and integers")
    _require(_same(q.shape[:2], k.shape[:2]), "q and k differ in batch or heads")
    _require(_same(k.shape[:3], v.shape[:3]), "k and v differ in batch, heads or tokens")
    _require(_same(q.shape[3:], k.shape[3:]), "q and k differ in width")
    scale, mask = call.arguments["scale"], call.arguments["mask"]
    _require(scale is None or isinstance(scale, (int, float)), "scale is no number")
    if mask is not None:
        torch.broadcast_shapes(_value(mask).shape, (*q.shape[:3], k.shape[2]))  # type: ignore[union-attr]


_SPECIFIC: dict[str, Callable[[Call], None]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "group_norm_silu_quantize": _group_norm,
    "layer_norm_quantize": _layer_norm,
    "geglu_quantize": _geglu,
    "cat_quantize": _cat,
    "upsample_quantize": _upsample,
    "add_quantize": _add,
    "attention": _attention,
}


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(bool(x == y) for x, y in zip(a, b, strict=True))


def _without(shape: Any, dim: int) -> list[Any]:
    return [size for axis, size in enumerate(shape) if axis != dim]


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise ArtifactError(complaint)
