"""The classes that forward returns its tensor in."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor, nn

from fxquant.graph.signature import RESULT, Signature
from fxquant.graph.structure import names_in


@dataclass
class DenoiserOutput(BaseOutput):
    """What a module without an output class of its own returns for return_dict=True."""

    sample: Tensor


def output_class(original: type[nn.Module], signature: Signature) -> type[Any] | None:
    """The dataclass that forward's annotation promises, a plain one if it takes return_dict."""
    parameters = inspect.signature(original.forward).parameters
    if "return_dict" not in parameters:
        return None
    promised = _annotated_return(original.forward)
    for candidate in (promised, *typing.get_args(promised)):
        if inspect.isclass(candidate) and is_dataclass(candidate):
            return candidate
    return output_for(signature)


def output_for(signature: Signature) -> type[Any] | None:
    """The output class of a model whose original names none: several tensors it returns as is."""
    is_alone = [*names_in(signature.result)] == [RESULT]
    return DenoiserOutput if signature.takes_return_dict and is_alone else None


def _annotated_return(function: Callable[..., Any]) -> Any:
    try:
        return typing.get_type_hints(function).get("return")
    except NameError:  # an annotation that only type checkers can resolve
        return None
