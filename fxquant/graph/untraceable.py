"""Why torch.export could not trace a module, where, and what to do: one advice for each cause."""

from __future__ import annotations

import traceback
from pathlib import Path

from torch import nn

_VALUES = (
    "Its forward asks for the value of a tensor here: in an `if`, by .item(), .tolist(), int() or "
    "as a size. Such a value is not known while the module is captured. Compute it beforehand and "
    "pass it as a number, which is fixed then, or compile the submodule that does not need it"
)
_NUMPY = (
    "Its forward leaves torch here. Compute that with torch's operators, or before the call and "
    "pass the result as an argument"
)
_SIZES = (
    "The sizes of this call do not fit each other, or the module does not take them. Call the "
    "module itself with the calibration call: it should fail in the same place"
)
_KIND = (
    "An argument is of another kind than the module expects. Call the module itself with the "
    "calibration call: it should fail in the same place"
)
_OPERATOR = (
    "That operator cannot be traced without values: it has no fake kernel "
    "(torch.library.register_fake gives it one). Compile the submodule without it"
)
_DATA = "Write into the tensor instead, with copy_()"
_OTHER = (
    "A module is captured whole, without running Python when it serves. Compile the submodule that "
    "can be traced"
)
# Parts of the error's class and message, and the advice; the first that fits is given.
_CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("datadependent", "data-dependent", "unbacked", "_local_scalar_dense", "symint"), _VALUES),
    (("assigns to .data",), _DATA),
    ((".numpy()", "numpy", "tensor subclasses"), _NUMPY),
    (("unsupportedoperator", "notimplemented", "fake kernel", "fake impl"), _OPERATOR),
    (("typeerror", "attributeerror", "scalar type", "same dtype", "expected tensor"), _KIND),
    (("size", "shape", "dimension", "constraint", "broadcast"), _SIZES),
)


def explain(error: Exception, model: nn.Module) -> str:
    """The module and line that stopped the tracer, its words, and an advice that fits them."""
    paths = {id(m): p for p, m in model.named_modules()}
    place = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        code, owner = frame.f_code, frame.f_locals.get("self")
        if id(owner) in paths and "torch" not in Path(code.co_filename).parts:
            where = f"{paths[id(owner)] or '(root)'} ({type(owner).__name__})"
            place = f" in module {where}, {Path(code.co_filename).name}:{number} in {code.co_name}"
    reason = str(error).strip().split("\n\n")[0][:600]
    return (
        f"torch.export could not trace {type(model).__name__}{place}: {type(error).__name__}: "
        f"{reason}\n{advice(error)}."
    )


def advice(error: Exception) -> str:
    """What to do about the cause."""
    said = f"{type(error).__name__} {error}".lower()
    return next((text for words, text in _CAUSES if any(w in said for w in words)), _OTHER)
