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
        with self._lock:
            if key not in self._captured:
                self._captured[key] = self._capture(tensors)
                while len(self._captured) > self._most:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            captured = self._captured[key]
            for kept, given in zip(captured.inputs, tensors, strict=True):
                kept.copy_(given)
            captured.graph.replay()
            return captured.output.clone()

    def _capture(self, tensors: Sequence[Tensor]) -> _Captured:
        inputs = tuple(t.clone() for t in tensors)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._step(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._step(*inputs)
        return _Captured(graph, inputs, output)
