"""A lowered graph's steps as CUDA graphs: launched as one, instead of a kernel at a time.

A step of a large UNet is a thousand launches, which take a CPU longer than a fast GPU needs for the
work. The first call with each set of shapes runs and captures the step, later ones replay it. A
graph knows addresses, of weights in their kernels' own order too: when a weight, scale or constant
was changed or replaced, or the program's graph was, the step is captured anew.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.graph.results import Result, mapped
from fxquant.runtime.program import Program, State

log = logging.getLogger(__name__)

_WARM_UP = 2  # runs before a capture: libraries open, weights are prepared, torch picks algorithms


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Result
    done: torch.cuda.Event
    state: State


class CapturedSteps:
    """Calls ``program`` through CUDA graphs.

    A program whose tensors count no changes, as those made in inference mode, is run instead: after
    one notice.

    Args:
        program: takes CUDA tensors, allocates only through torch and waits for nothing.
        most: shapes to keep graphs of; the one used longest ago goes first. Each holds the memory
            of its activations.
    """

    def __init__(self, program: Program, most: int = 4) -> None:
        self._program, self._most = program, most
        self._captured: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()
        self._lock = threading.Lock()  # a graph has one set of inputs and outputs
        self._noticed = False

    def __call__(self, *tensors: Tensor) -> Result:
        """``program(*tensors)``, in a tensor of its own."""
        # What is kept must be writable by later calls, inference mode or not.
        with self._lock, torch.cuda.device(tensors[0].device), torch.inference_mode(False):
            captured, stream = self._current(tensors), torch.cuda.current_stream()
            if captured is None:
                return self._program(*tensors)
            stream.wait_event(captured.done)  # another thread's stream may still use the graph
            with torch.no_grad():
                for kept, given in zip(captured.inputs, tensors, strict=True):
                    kept.copy_(given)
                captured.graph.replay()
                result = mapped(Tensor.clone, captured.output)
            captured.done.record(stream)
            return result

    def _current(self, tensors: Sequence[Tensor]) -> _Captured | None:
        """The graph of the present program for these shapes."""
        key = tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)
        captured = self._captured.pop(key, None)
        if captured is not None and not captured.state.is_of(self._program):
            captured.done.synchronize()  # its memory goes to the next one
            captured = None
        state = captured.state if captured else self._program.state()
        if state is None:
            self._notice()
            return None
        self._captured[key] = captured = captured or self._capture(tensors, state)
        while len(self._captured) > self._most:
            self._captured.popitem(last=False)
        return captured

    def _notice(self) -> None:
        if not self._noticed:
            self._noticed = True
            log.warning(
                "steps are not captured: some weights were made in inference mode, which counts no "
                "changes. Load weights outside of torch.inference_mode() to avoid this."
            )

    @torch.no_grad()
    def _capture(self, tensors: Sequence[Tensor], state: State) -> _Captured:
        inputs = tuple(torch.empty_like(t).copy_(t) for t in tensors)
        aside = torch.cuda.Stream()  # of the current device, which is the tensors'
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._program(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            output = self._program(*inputs)
        return _Captured(graph, inputs, output, torch.cuda.Event(), state)
