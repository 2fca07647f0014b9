"""What a model asked of its sizes while torch.export traced it.

The tracer answers every question about a symbolic size from the example, and writes it down: in
`if height % 8:` one branch is traced, and the graph holds for sizes that give the same answer.
Questions that torch's own shape rules ask are left out, since operators ask them again when they
run; but not into how many parts something is split, for that many are named in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
import torch
from torch.fx.experimental import symbolic_shapes
from torch.utils._sympy.functions import Mod, PythonMod

from fxquant.errors import CaptureError
from fxquant.graph.limits import Guard, Limits, limits_of, size_names
from fxquant.graph.size_expressions import to_text

_TORCH = Path(torch.__file__).parent
# Where torch computes shapes and layouts of values, which decides nothing in the graph.
_SHAPE_RULES = (
    "_refs", "_prims", "_prims_common", "_decomp", "_meta_registrations.py", "_subclasses",
    "_library", "fx", "_dispatch", "_higher_order_ops", "_ops.py", "utils",
)  # fmt: skip
_COUNTS = ("split", "unsafe_split", "chunk", "unsafe_chunk", "tensor_split", "unbind")
# Both branches compute the same: a copy into contiguous memory, which older kernels needed.
_HARMLESS = "diffusers/models/upsampling.py"
# UNets that upsample to a skip's size do so for every size; only the shorter way, by a factor,
# holds for some.
_UNETS = "diffusers/models/unets/unet_"


def traced_limits(inputs: Sequence[Any]) -> Limits:
    """The limits of a captured graph, from its inputs' example values.

    Raises:
        CaptureError: the model asks something that cannot be written down.
    """
    names = _batches_named(inputs, size_names(inputs))
    return limits_of(inputs, names, _guards(inputs, names))


def _batches_named(
    inputs: Sequence[Any], names: dict[sympy.Symbol, str]
) -> dict[sympy.Symbol, str]:
    """The names, one for all that can only be the batch of the first input.

    `ids.flatten().reshape(batch, -1)` before a layer of fixed width makes two sizes equal without
    any rule that says so in as many words.
    """
    first = _lone_symbol(inputs[0])
    for value in inputs[1:] if first else ():
        other = _lone_symbol(value)
        if other and other != first and _are_equal(_environment(inputs), first, other):
            names = names | {other: names[first]}
    return names


def _lone_symbol(value: Any) -> sympy.Symbol | None:
    """The symbol that is the first dimension."""
    size = value.shape[0] if value.ndim else 0
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return expression if isinstance(expression, sympy.Symbol) else None


def _are_equal(environment: Any, a: sympy.Symbol, b: sympy.Symbol) -> bool:
    """Do the tracer's equations hold where both are equal, and nowhere else?"""
    asked = [environment.replace(guard.expr) for guard in environment.guards]
    equations = [e for e in asked if isinstance(e, sympy.Eq) and e.free_symbols == {a, b}]

    def hold(x: int, y: int) -> bool:
        values = {a: sympy.Integer(x), b: sympy.Integer(y)}
        return all(e.subs(values) == sympy.true for e in equations)

    sizes = range(2, 7)
    return bool(equations) and all(hold(x, y) == (x == y) for x in sizes for y in sizes)


def _environment(inputs: Sequence[Any]) -> Any:
    return next(v.fake_mode.shape_env for v in inputs if hasattr(v, "fake_mode"))


def _guards(inputs: Sequence[Any], names: Mapping[sympy.Symbol, str]) -> list[Guard]:
    environment = _environment(inputs)
    found: dict[str, Guard] = {}
    for guard in environment.guards:
        place = _place(guard)
        expression = environment.replace(guard.expr)
        if place is None or expression == sympy.true or not _is_asked(expression, place):
            continue
        if not expression.free_symbols <= set(names):
            continue  # of a size that the graph computes, which operators check
        try:
            text = to_text(expression, names)
        except ValueError as error:
            raise CaptureError(
                f"{place} asks something of the sizes that cannot be written down: {error}"
            ) from error
        found.setdefault(text, Guard(text, place))
    return list(found.values())


@contextmanager
def asked_by_the_model() -> Iterator[None]:
    """While tracing, a question that Python's min and max ask is the caller's own."""
    original = getattr(symbolic_shapes, "uninteresting_files", None)
    if original is None:
        yield
        return
    files = original() | {str(_TORCH / "_export" / "non_strict_utils.py")}
    with mock.patch.object(symbolic_shapes, "uninteresting_files", return_value=files):
        yield


def counts_pieces(guard: Any) -> bool:
    """Does it ask into how many parts something is split?"""
    return getattr(guard.sloc.framework_loc, "name", "") in _COUNTS


def _place(guard: Any) -> str | None:
    """File, line and function that asked; None if it was a shape rule of torch."""
    frame = guard.sloc.framework_loc
    if frame is None or isinstance(frame, str):
        return ""
    path = Path(frame.filename)
    if path.is_relative_to(_TORCH):
        is_rule = path.relative_to(_TORCH).parts[0] in _SHAPE_RULES
        return None if is_rule and not counts_pieces(guard) else _said(path, frame)
    return _said(path, frame)


def _said(path: Path, frame: Any) -> str:
    parts = path.parts
    for package in ("diffusers", "transformers", "torch"):
        if package in parts:
            name = "/".join(parts[parts.index(package) :])
            return f"{name}:{frame.lineno} in {frame.name}"
    return f"{path.name}:{frame.lineno} in {frame.name}"


def _is_asked(expression: Any, place: str) -> bool:
    """Does the answer decide what is computed?"""
    if place.startswith(_HARMLESS):
        return False
    is_remainder = isinstance(expression, sympy.Ne) and expression.has(Mod, PythonMod)
    return not (place.startswith(_UNETS) and is_remainder)
