"""A program's steps on a CPU, repeated without Python between the kernels.

A kernel's face checks operands, makes a tensor for the result and collects addresses: for the
thousand kernels of a large UNet a few percent of a step, for a small model most of it. All of that
is the same in every step with the same shapes. So the second such step is run in memory that stays
in place, each call of a compiled function is written down with its arguments, and from then on only
these calls are made. Operators that PyTorch runs are repeated between them.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxquant.graph.nodes import aten
from fxquant.graph.results import Result, mapped, parts
from fxquant.kernels.calls import Call, written_down
from fxquant.runtime.arena import Arena
from fxquant.runtime.program import Program, State, is_watched

log = logging.getLogger(__name__)

_EMPTY = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip
_INTO = {aten.cat.default: aten.cat.out, aten.add.Tensor: aten.add.out}
"""Operators worth writing in place; the results of others are copied there."""

_abandoned: list[Arena] = []
"""Arenas with memory that something outside of the recording holds."""


class NotRepeatableError(Exception):
    """A step may do something else next time, or nothing says when it would."""


@dataclass(frozen=True)
class _Recording:
    """A step's calls, in order, and the memory that they work in."""

    calls: list[Call]
    inputs: list[Tensor]
    output: Result
    state: State
    arena: Arena

    def replay(self, tensors: Sequence[Tensor]) -> Result:
        for kept, given in zip(self.inputs, tensors, strict=True):
            kept.copy_(given)
        for call in self.calls:
            call()
        return mapped(Tensor.clone, self.output)


class ReplayedSteps:
    """Calls ``program`` on CPU tensors, the third and later calls with the same shapes by replay.

    A recording has one set of tensors: a call that finds it in use by another thread runs the
    program instead. So does one under a profiler, a dispatch mode, autocast or `torch.compile`, and
    every call of a program with a kernel that is not repeatable.

    Args:
        most: shapes to keep recordings of; the one used longest ago goes first. Each holds the
            memory of its activations.
    """

    def __init__(self, program: Program, most: int = 2) -> None:
        self._program, self._most = program, most
        self._recordings: OrderedDict[tuple[object, ...], _Recording | None] = OrderedDict()
        self._is_repeatable = True
        self._lock = threading.Lock()

    def __call__(self, *tensors: Tensor) -> Result:
        if not self._is_repeatable or is_watched() or torch.is_autocast_enabled("cpu"):
            return self._program(*tensors)
        if not self._lock.acquire(blocking=False):
            return self._program(*tensors)
        try:
            return self._call(tensors)
        finally:
            self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayedSteps:
        """Without the recordings: they know the addresses of the original's tensors."""
        return type(self)(copy.deepcopy(self._program, memo), self._most)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._program, self._most)

    def _call(self, tensors: Sequence[Tensor]) -> Result:
        key = (torch.get_num_threads(), *((t.shape, t.dtype) for t in tensors))
        if key not in self._recordings:  # the first step prepares weights
            self._keep(key, None)
            return self._program(*tensors)
        try:
            return self._repeated(key, tensors)
        except NotRepeatableError as error:
            log.info("steps are not replayed: %s", error)
            self._is_repeatable = False
            return self._program(*tensors)

    def _repeated(self, key: tuple[object, ...], tensors: Sequence[Tensor]) -> Result:
        recording = self._recordings[key]
        if recording is None or not recording.state.is_of(self._program):
            recording = self._recorded(tensors)
            self._keep(key, recording)
            return mapped(Tensor.clone, recording.output)
        self._recordings.move_to_end(key)
        return recording.replay(tensors)

    def _keep(self, key: tuple[object, ...], recording: _Recording | None) -> None:
        self._recordings[key] = recording
        while len(self._recordings) > self._most:
            self._recordings.popitem(last=False)

    def _recorded(self, tensors: Sequence[Tensor]) -> _Recording:
        """Run a step and write it down."""
        state = self._program.state()
        if state is None:
            raise NotRepeatableError("tensors made in inference mode count no changes")
        if not state.reading.is_repeatable:
            raise NotRepeatableError("some kernel does not say that its calls can be repeated")
        calls: list[Call] = []
        arena = Arena()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            inputs = [torch.empty_like(t).copy_(t) for t in tensors]
            stack.enter_context(written_down(calls))
            stack.enter_context(_Recorder(calls, arena))
            output = state.reading.function(*inputs, *state.tensors)
        if arena.taken != arena.taken_by(parts(output)):
            _abandoned.append(arena)  # it must not be freed under whoever holds it
            raise NotRepeatableError("something keeps what was made in a step for the next one")
        return _Recording(calls, inputs, output, state, arena)


class _Recorder(TorchDispatchMode):
    """Writes down PyTorch's operators, and puts what they make into the arena."""

    def __init__(self, calls: list[Call], arena: Arena) -> None:
        super().__init__()
        self._calls, self._arena = calls, arena

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _EMPTY:
            return self._arena.empty_like(result)
        made = tree_leaves(result) if func._schema.returns else []
        if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in made):
            raise NotRepeatableError(f"{func} does not return plain tensors")
        given = _storages(tree_leaves((args, kwargs)))
        if all(_storages([t]) & given for t in made):  # written to, or views of what stays in place
            if func._schema.is_mutable or not made:
                self._write_down(func, args, kwargs)
            return result
        kept = tree_map_only(
            Tensor, lambda t: t if _storages([t]) & given else self._arena.empty_like(t), result
        )
        _copy(result, kept)
        if func in _INTO and _is_one_dtype(args, kept):
            self._write_down(_INTO[func], args, {**kwargs, "out": kept})
        else:
            self._write_down(_copied(func), (kept, *args), kwargs)
        return kept

    def _write_down(self, func: Any, args: Any, kwargs: Any) -> None:
        """Calls are made when their operands are in place, and must not hold their memory."""
        args, kwargs = tree_map_only(Tensor, self._arena.borrowed, (args, kwargs))
        self._calls.append(functools.partial(func, *args, **kwargs))


def _copied(func: Any) -> Callable[..., None]:
    """``func``, with its result copied to the first argument."""
    return lambda kept, *args, **kwargs: _copy(func(*args, **kwargs), kept)


def _is_one_dtype(args: Any, kept: Any) -> bool:
    return all(t.dtype == kept.dtype for t in tree_leaves(args) if isinstance(t, Tensor))


def _copy(result: Any, kept: Any) -> None:
    for new, old in zip(tree_leaves(result), tree_leaves(kept), strict=True):
        if new.shape != old.shape:
            raise NotRepeatableError(f"values decide a shape: {[*old.shape]}, then {[*new.shape]}")
        old.copy_(new)


def _storages(values: Iterable[object]) -> set[int]:
    tensors = (v for v in values if isinstance(v, Tensor) and v.layout == torch.strided)
    return {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}
