"""The UNet calls of a sampler run, ready to be a calibration loader.

calls = record(pipe.unet, lambda: pipe(prompts, num_inference_steps=50), every=5)
qunet = fxquant.compile(pipe.unet, calls)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Any]


def record(model: nn.Module, run: Callable[[], object], *, every: int = 1) -> list[Call]:
    """Run `run` and return what it called `model` with.

    Args:
        model: the denoiser that `run` calls; it is only watched.
        run: a pipeline call or a hand-written loop, without arguments; its result is dropped.
        every: keep the first of each `every` calls.

    Returns:
        One dict a kept call: forward's arguments by name, as CPU copies of the given dtypes.
        Nested dicts and tuples stay nested, None and return_dict are left out, and a number given
        as timestep is a 0-d tensor.

    Raises:
        ValueError: `every` is below 1, or `run` never called the model.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, got {every}")
    signature = inspect.signature(model.forward)
    calls: list[Call] = []
    seen = 0

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if seen % every == 0:
            calls.append(_call(signature, args, kwargs))
        seen += 1

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if not calls:
        raise ValueError(
            f"nothing was recorded: run never called this {type(model).__name__}. Pass the very "
            "module that the pipeline holds (pipe.unet), and call it, not its forward"
        )
    return calls


def _call(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """One call by argument name. TypeError, as forward itself would raise, when it does not fit."""
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    bound.pop("return_dict", None)
    # Pipelines run in inference mode at will; copies made there could never meet autograd again.
    with torch.inference_mode(mode=False), torch.no_grad():
        call: Call = _copied(bound)
    timestep = call.get("timestep")
    if isinstance(timestep, int | float):
        call["timestep"] = torch.tensor(timestep)
    return call


def _copied(value: Any) -> Any:
    """A copy on the CPU, through dicts and sequences. Dicts lose the entries that are None."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return tuple(_copied(item) for item in value)
    return value
