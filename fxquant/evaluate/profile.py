"""Where the time of a step goes, by kind of operator."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from fxquant.graph.lowered import is_op
from fxquant.graph.nodes import is_symbolic
from fxquant.logs import progress
from fxquant.runtime.model import QuantizedModel


@dataclass(frozen=True)
class KindTime:
    """One kind of operator in one step.

    Attributes:
        kind: "fxquant.conv2d gemm", "aten.add", or "sizes" for shape arithmetic.
        calls: number of nodes.
        seconds: median over the rounds of the sum over the nodes.
    """

    kind: str
    calls: int
    seconds: float


def time_by_kind(
    model: QuantizedModel,
    tensors: Sequence[Tensor],
    rounds: int = 5,
    warmup: int = 2,
    show: bool = False,
) -> list[KindTime]:
    """Time of each kind of operator in a call, the longest first.

    The graph is run node by node, each waited for on a GPU; the interpreter's own time between
    nodes is not counted, so the sum differs a little from a plain call.

    Args:
        tensors: flat inputs of one call.
        rounds: timed runs; `warmup` more before them are not counted.
    """
    row = model.table.row(0)
    index = model.signature.timestep_index
    if index is not None:
        row = model.table.row(int(model.table.group(tensors[index])[0]))
    runs = []
    for turn in progress(range(warmup + rounds), "profile", "run", show=show):
        timer = _Timer(model.graph)
        with torch.no_grad():
            timer.run(*tensors, row)
        if turn >= warmup:
            runs.append(timer.seconds)
    calls = Counter(kind(n) for n in model.graph.graph.nodes if n.op == "call_function")
    times = [KindTime(k, calls[k], median(run[k] for run in runs)) for k in calls]
    return sorted(times, key=lambda t: -t.seconds)


def kind(node: Node) -> str:
    """How a node is filed: operator, and kernel where it has one."""
    if is_op(node):
        return f"fxquant.{str(node.target).split('.')[1]} {node.args[-1]}"
    if is_symbolic(node):
        return "sizes"
    name = str(node.target).split(".")
    return ".".join(name[:2]) if name[0] == "aten" else getattr(node.target, "__name__", str(name))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float


def interleaved(
    systems: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    warmup: int = 2,
    show: bool = False,
) -> dict[str, Timing]:
    """Time each system; they take turns, so that a busy machine is unfair to none.

    Args:
        systems: calls that return when their result is there (on a GPU: that synchronise).
        rounds: timed turns; `warmup` more before them compile, pack and warm caches.
    """
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in progress(range(warmup + rounds), "time", "round", show=show):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: Timing(median(t), min(t), max(t)) for name, t in times.items()}


class _Timer(Interpreter):
    """Seconds by kind of one run."""

    def __init__(self, gm: torch.fx.GraphModule):
        super().__init__(gm)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        started = time.perf_counter()
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_cuda:
            torch.cuda.synchronize()
        self.seconds[kind(n)] += time.perf_counter() - started
        return value
