"""The module itself, out of what others wrapped around it; and what cannot be compiled at all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from fxquant.errors import CaptureError

log = logging.getLogger(__name__)

_HOOKS = {
    "layerwise_casting": "load it again without enable_layerwise_casting(): its weights were "
    "rounded to a storage type, and moving them back does not undo that",
    "group_offloading": "load it again without enable_group_offload()",
    "lazy_prefetch_group_offloading": "load it again without enable_group_offload()",
    "layer_execution_tracker": "load it again without enable_group_offload()",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """What is compiled when `model` is asked for; a wrapper is taken off with a note in the log.

    Raises:
        CaptureError: it cannot be compiled as it is: hooks that move or cast weights or skip
            layers, weights that are not there, or are not plain floats, ... The message has a way.
    """
    found = unwrapped(model)
    if found is not model:
        log.info("compiling the %s inside the %s", type(found).__name__, type(model).__name__)
    for problem in _problems(found):
        raise CaptureError(f"{type(found).__name__} cannot be compiled as it is: {problem}")
    return found


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    if isinstance(model, DataParallel | DistributedDataParallel):
        return model.module
    return None


def _problems(model: nn.Module) -> Iterator[str]:
    """One after the other; what the first says is enough."""
    if isinstance(model, torch.jit.ScriptModule):
        yield "it is TorchScript. Pass the module that was scripted or traced"
    for path, module in model.named_modules():
        place = f"{path or '(root)'} ({type(module).__name__})"
        yield from _kinds(place, module)
        yield from _hooks(place, module)
    yield from _tensors(model)
    if (quantiser := getattr(model, "hf_quantizer", None)) is not None:
        yield (
            f"{type(quantiser).__name__} has quantised it already. Load it without "
            "quantization_config"
        )


def _kinds(place: str, module: nn.Module) -> Iterator[str]:
    name = type(module).__name__
    if name == "FullyShardedDataParallel":
        yield f"{place} holds a part of the weights only. Gather them into a plain module first"
    if any(base.__name__ == "QuantizedModel" for base in type(module).__mro__):
        yield f"{place} is a compiled model already. Compile the float model it was made from"


def _hooks(place: str, module: nn.Module) -> Iterator[str]:
    if (hook := getattr(module, "_hf_hook", None)) is not None:
        yield (
            f"accelerate's {type(hook).__name__} moves the weights or inputs of {place}. Take it "
            "off with accelerate.hooks.remove_hook_from_module(model, recurse=True), or with "
            "pipe.remove_all_hooks(), or load the model without device_map"
        )
    registry = getattr(module, "_diffusers_hook", None)
    for name in registry.hooks if registry is not None else ():
        yield (
            f"diffusers' {name} hook changes how {place} runs; "
            + _HOOKS.get(
                name,
                "take it off with disable_cache(), or with "
                f"module._diffusers_hook.remove_hook({name!r})",
            )
        )


def _tensors(model: nn.Module) -> Iterator[str]:
    devices: Counter[str] = Counter()
    for name, tensor in model.named_parameters():
        devices[str(tensor.device)] += 1
        if tensor.device.type == "meta":
            yield (
                f"{name} is on the meta device, where tensors have no values. Load the weights "
                "first: from_pretrained, or model.to_empty(device=...) and load_state_dict"
            )
        if isinstance(tensor, UninitializedTensorMixin):
            yield f"{name} is not initialised yet. Call the module once first"
        yield from _kind_of_tensor(name, tensor)
    if len(devices) > 1:
        said = ", ".join(f"{count} on {device}" for device, count in sorted(devices.items()))
        yield f"its weights are on several devices: {said}. Move it to one: model.to(device)"


def _kind_of_tensor(name: str, tensor: Tensor) -> Iterator[str]:
    if _is_foreign(type(tensor)):
        yield (
            f"{name} is a {type(tensor).__name__}, sharded or quantised by another library. Load "
            "the model with plain weights"
        )
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        yield (
            f"{name} is stored as {tensor.dtype}, in which nothing computes: "
            "call model.to(torch.bfloat16) first"
        )


def _is_foreign(kind: type[Tensor]) -> bool:
    """Does this kind of tensor compute in a way of its own?"""
    own = [getattr(method, "__func__", method) for method in _ways(kind)]
    plain = [getattr(m, "__func__", m) for k in (Tensor, nn.Parameter) for m in _ways(k)]
    return not all(method in plain for method in own)


def _ways(kind: Any) -> tuple[Any, Any]:
    return kind.__torch_function__, kind.__torch_dispatch__
