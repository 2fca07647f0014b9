"""A lowered graph's steps as CUDA graphs: launched as one, instead of a kernel at a time.

A step of a large UNet is a thousand launches, which take a CPU longer than a fast GPU needs for the
work. The first call with each set of shapes runs and captures the step, later ones replay it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WARM_UP = 2  # runs before a capture: libraries open, weights are prepared, torch picks algorithms

Step = Callable[..., Tensor]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor
    done: torch.cuda.Event


class CapturedSteps:
    """Calls ``step`` through CUDA graphs.

    Args:
        step: takes CUDA tensors, allocates only through torch and waits for nothing.
        most: shapes to keep graphs of; the one used longest ago goes first. Each holds the memory
            of its activations.
    """

    def __init__(self, step: Step, most: int = 4) -> None:
        self._step, self._most = step, most
        self._captured: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()
        self._lock = threading.Lock()  # a graph has one set of inputs and outputs

    def __call__(self, *tensors: Tensor) -> Tensor:
        """``step(*tensors)``, in a tensor of its own."""
        key = tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)
        # What is kept must be writable by later calls, inference mode or not.
        with self._lock, torch.cuda.device(tensors[0].device), torch.inference_mode(False):
            if key not in self._captured:
                self._captured[key] = self._capture(tensors)
                while len(self._captured) > self._most:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            captured, stream = self._captured[key], torch.cuda.current_stream()
            stream.wait_event(captured.done)  # another thread's stream may still use the graph
            with torch.no_grad():
                for kept, given in zip(captured.inputs, tensors, strict=True):
                    kept.copy_(given)
                captured.graph.replay()
                result = captured.output.clone()
            captured.done.record(stream)
            return result

    @torch.no_grad()
    def _capture(self, tensors: Sequence[Tensor]) -> _Captured:
        inputs = tuple(torch.empty_like(t).copy_(t) for t in tensors)
        aside = torch.cuda.Stream()  # of the current device, which is the tensors'
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._step(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            output = self._step(*inputs)
        return _Captured(graph, inputs, output, torch.cuda.Event())
