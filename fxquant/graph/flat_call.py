"""A module as torch.export traces it: from flat tensors to those that it returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxquant.errors import CallError, CaptureError
from fxquant.graph.results import Result, result_of
from fxquant.graph.signature import NOTHING, RESULT, Signature
from fxquant.graph.structure import Skeleton, renamed, taken_apart


class AsksForValuesError(Exception):
    """Forward asks for the value of a tensor; the tracer's error is the cause.

    No RuntimeError: for one of these torch prints the whole graph.
    """


class _DataAsDetached(TorchFunctionMode):
    """`x.data` is `x.detach()`: the same memory, in a way that the tracer sees. What is assigned to
    it the tracer would lose."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == _DATA:
            return args[0].detach()
        if func == _SET_DATA:
            raise AttributeError("it assigns to .data of a tensor")
        return func(*args, **(kwargs or {}))


_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass
class Returned:
    """How the tensors nest in what the module returned, and the class around it."""

    result: Skeleton | str = RESULT
    output: type[Any] | None = None


class FlatModule(nn.Module):
    """forward(*flat tensors) -> the tensor that the wrapped module returns, or a tuple of them.

    Attributes:
        returned: filled in by forward. An object of its own: export takes back what a module's
            attributes are set to while it traces.
    """

    def __init__(self, model: nn.Module, signature: Signature):
        super().__init__()
        self.model = model
        self._signature = signature
        self.returned = Returned()

    def forward(self, *tensors: Tensor) -> Result:
        args, kwargs = self._signature.call(tensors)
        try:
            with _DataAsDetached():
                output = self.model(*args, **kwargs)
        except RuntimeError as error:
            if "data-dependent" in str(error):
                raise AsksForValuesError from error
            raise
        if _is_record(output):
            self.returned.output = type(output)
        self.returned.result, tensors_returned = tensors_in(output)
        return result_of(tensors_returned)


def tensors_in(output: Any) -> tuple[Skeleton | str, list[Tensor]]:
    """How tensors nest in what forward returns, and the tensors. A single one is called RESULT.

    Raises:
        CaptureError: there is no tensor, or something else than tensors and None.
    """
    if _is_record(output):
        output = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    try:
        skeleton, leaves = taken_apart(RESULT, output)
    except CallError:
        raise CaptureError(_returns(output, "what is neither a tensor nor None")) from None
    values = {n: value for n, value in leaves.items() if value is not None}
    other = next((v for v in values.values() if not isinstance(v, Tensor)), None)
    if other is not None or not values:
        raise CaptureError(_returns(output, "no tensor" if other is None else repr(other)))
    single = len(values) == 1
    names = {n: NOTHING if n not in values else RESULT if single else n for n in leaves}
    return renamed(skeleton, names), list(values.values())


def _is_record(output: Any) -> bool:
    return dataclasses.is_dataclass(output) and not isinstance(output, type)


def _returns(output: Any, what: str) -> str:
    return (
        f"forward returns a {type(output).__name__} with {what} in it; a compiled model returns "
        "tensors and None, alone or in dicts, lists and tuples. Wrap the module in one whose "
        "forward returns the tensors you need."
    )
