"""The UNet calls of a sampler run, ready to be a calibration loader.

calls = record(pipe.unet, lambda: pipe(prompts, num_inference_steps=50), every=5)
qunet = fxquant.compile(pipe.unet, calls)

`trajectories.record_selected` keeps the samples that TDAC chooses instead of every n-th call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        Nested dicts, lists and tuples stay what they are, return_dict is left out, and a number
        given as timestep is a 0-d tensor.

    Raises:
        ValueError: `every` is below 1, or `run` never called the model.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, got {every}")
    calls: list[Call] = []
    seen = 0

    def see(arguments: Mapping[str, Any]) -> None:
        nonlocal seen
        if seen % every == 0:
            calls.append(_call(arguments))
        seen += 1

    with watching(model, see):
        run()
    if not calls:
        raise ValueError(never_called(model))
    return calls


@contextmanager
def watching(model: nn.Module, see: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Show `see` every call of the model meanwhile: arguments by name, as given.

    Copies it makes are plain tensors: pipelines run in inference mode at will, and what is copied
    there could never meet autograd again. TypeError, as from forward, when a call does not fit.
    """
    signature = inspect.signature(model.forward)

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
            elif parameter.kind is parameter.VAR_POSITIONAL and name in bound:
                bound[f"*{name}"] = bound.pop(name)  # as a Signature calls it
        bound.pop("return_dict", None)
        with torch.inference_mode(mode=False), torch.no_grad():
            see(bound)

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def never_called(model: nn.Module) -> str:
    """What to say when nothing was recorded."""
    return (
        f"nothing was recorded: run never called this {type(model).__name__}. Pass the very "
        "module that the pipeline holds (pipe.unet), and call it, not its forward"
    )


def _call(arguments: Mapping[str, Any]) -> Call:
    call: Call = _copied(arguments)
    timestep = call.get("timestep")
    if isinstance(timestep, int | float):
        call["timestep"] = torch.tensor(timestep)
    return call


def _copied(value: Any) -> Any:
    """A copy on the CPU, through dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_copied(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
