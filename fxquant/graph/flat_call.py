"""A module as torch.export traces it: from flat tensors to the one tensor that it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxquant.errors import CaptureError
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
    """How the tensor nests in what the module returned, and the class around it."""

    result: Skeleton | str = RESULT
    output: type[Any] | None = None


class FlatModule(nn.Module):
    """forward(*flat tensors) -> the only tensor that the wrapped module returns.

    Attributes:
        returned: filled in by forward. An object of its own: export takes back what a module's
            attributes are set to while it traces.
    """

    def __init__(self, model: nn.Module, signature: Signature):
        super().__init__()
        self.model = model
        self._signature = signature
        self.returned = Returned()

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = self._signature.call(tensors)
        try:
            with _DataAsDetached():
                output = self.model(*args, **kwargs)
        except RuntimeError as error:
            if "data-dependent" in str(error):
                raise AsksForValuesError from error
            raise
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            self.returned.output = type(output)
            output = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        skeleton, leaves = taken_apart(RESULT, output)
        names = {n: NOTHING if value is None else RESULT for n, value in leaves.items()}
        self.returned.result = renamed(skeleton, names)
        return _only_tensor(output, leaves)


def _only_tensor(output: Any, leaves: Mapping[str, Any]) -> Tensor:
    values = [value for value in leaves.values() if value is not None]
    if len(values) == 1 and isinstance(values[0], Tensor):
        return values[0]
    raise CaptureError(
        f"forward returns a {type(output).__name__} of {len(values)} values; a denoiser returns "
        "one tensor, alone or in a tuple. Wrap the module in one whose forward returns the tensor "
        "you need."
    )
