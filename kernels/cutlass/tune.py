"""Measures every tile on every layer of shapes.py, for `choose`'s table.

What is measured is the GPU's time alone: calls are captured in a CUDA graph, on as many copies of
a layer's tensors as no cache holds, and systems take turns. bfloat16 takes as long as float16, so
its rows are float16's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.kernels.cuda import build
from fxquant.kernels.cutlass import gemm, shapes
from fxquant.kernels.cutlass.choose import Problem, fitting, forced, tuned_path, write
from fxquant.kernels.cutlass.shapes import Conv, Linear
from fxquant.kernels.cutlass.tiles import Tile
from fxquant.kernels.int4 import pack_int4

OUTS = {"f16": torch.float16, "s8": torch.int8}
"""The types of output that are measured, by their names in `Problem`."""

_FEWEST, _MOST = 16, 256  # calls in a graph, of which each has a copy of its own if it need be
_L2 = 64 * 2**20
_AHEAD = 400_000  # cycles that the GPU waits while what it is to run is queued

Call = Callable[[], object]
Times = dict[str, list[float]]
Row = tuple[Problem, str, Sequence[float]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Layer:
    """A layer with weights of 8 or 4 bits."""

    shape: Linear | Conv
    bits: int = 8

    @property
    def op(self) -> str:
        """As the layer is multiplied: a convolution of single pixels is a GEMM."""
        if isinstance(self.shape, Linear) or (self.shape.kernel, self.shape.stride) == (1, 1):
            return "gemm"
        return "conv"

    @property
    def products(self) -> gemm.Products:
        return gemm.INT8 if self.bits == 8 else gemm.INT4

    @property
    def types(self) -> str:
        """What the tile multiplies: int4 weights of convolutions are unpacked before."""
        return "s8" if self.op == "conv" else self.products.types

    @property
    def sizes(self) -> tuple[int, int, int]:
        """m, n and k of its products."""
        s = self.shape
        if isinstance(s, Linear):
            return s.m, s.n, s.k
        return shapes.BATCH * s.out**2, s.n, s.kernel**2 * s.channels

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        m, n, k = self.sizes
        return 2 * m * n * k

    def problem(self, out: str) -> Problem:
        return Problem(self.op, self.types, out, *self.sizes)

    @property
    def bytes(self) -> int:
        """Read and written, in int8 with a float16 output."""
        m, n, k = self.sizes
        s = self.shape
        x = m * k if isinstance(s, Linear) else shapes.BATCH * s.size**2 * s.channels
        return x + n * k * self.bits // 8 + 2 * m * n

    @property
    def copies(self) -> int:
        """How many sets of its tensors are three times what the GPU's cache holds."""
        return max(2, min(_MOST, -(-3 * _L2 // self.bytes)))


class Operands:
    """A layer's tensors on the current GPU: random integers, ``layer.copies`` of each."""

    def __init__(self, layer: Layer):
        self.layer = layer
        _, n, _ = layer.sizes
        self.row = torch.tensor([[0.02, 3.0], [0.05, -7.0]], device="cuda")
        self.scale = torch.full((n,), 1e-4, device="cuda")
        self.bias = torch.ones(n, device="cuda")
        self.pairs = [self._pair() for _ in range(layer.copies)]

    def _pair(self) -> tuple[Tensor, Tensor]:
        shape = self.layer.shape
        if isinstance(shape, Linear):
            return _integers(shape.m, shape.k), self._weight(_integers(shape.n, shape.k))
        x = _integers(shapes.BATCH, shape.channels, shape.size, shape.size)
        weight = _integers(shape.n, shape.channels, shape.kernel, shape.kernel)
        return x.contiguous(memory_format=torch.channels_last), self._weight(weight)

    def _weight(self, integers: Tensor) -> Tensor:
        if self.layer.bits == 4:
            return pack_int4(integers >> 4)
        if integers.dim() == 4:
            return integers.contiguous(memory_format=torch.channels_last)
        return integers

    def calls(self, out: str, tile: str) -> list[Call]:
        """The layer on each of the copies, through a tile."""
        return [functools.partial(_with_tile, tile, self._call(*pair, out)) for pair in self.pairs]

    def _call(self, x: Tensor, weight: Tensor, out: str) -> Call:
        shape, products, bits = self.layer.shape, self.layer.products, self.layer.bits
        begin = (x, self.row, 0, weight, self.scale, self.bias, bits)
        end = ("none", None, 1 if out == "s8" else -1, 8, OUTS[out])
        if isinstance(shape, Linear):
            return functools.partial(products.linear, *begin, *end)
        kernel, pad = shape.kernel, shape.kernel // 2
        window = ((kernel, kernel), (shape.stride, shape.stride), (pad,) * 4, (1, 1), 1, None)
        return functools.partial(products.conv2d, *begin, *window, *end)


def tune(progress: Say) -> Path:
    """Measure this GPU and keep the table where `choose` looks first.

    Returns the table's file. ``progress`` is told of every layer. Raises BackendError if a kernel
    fails on the GPU, which then needs a new process.
    """
    gpu = torch.cuda.get_device_name()
    wanted = [(layer, out) for layer in layers() for out in OUTS]
    rows: list[Row] = []
    for number, (layer, out) in enumerate(wanted, 1):
        times = tile_times(Operands(layer), out)
        if times:
            new = rows_of(layer.problem(out), times)
            rows += new
            problem, tile, best = new[0]
            progress(f"[{number}/{len(wanted)}] {problem}: {tile}, {median(best):.1f} us")
    keep(tuned_path(gpu), gpu, rows)
    return tuned_path(gpu)


def layers(archs: Iterable[str] = ("sdxl", "sd14")) -> list[Layer]:
    """Every distinct problem of the architectures, as a layer; linears with both weights."""
    found: dict[Problem, Layer] = {}
    for arch in archs:
        linears = [Layer(s, bits) for s in shapes.LINEARS[arch] for bits in (8, 4)]
        for layer in (*linears, *(Layer(s) for s in shapes.CONVS[arch])):
            found.setdefault(layer.problem("f16"), layer)
    return list(found.values())


def tile_times(
    operands: Operands,
    out: str,
    beside: Mapping[str, Sequence[Call]] | None = None,
    rounds: int = 7,
) -> Times:
    """Microseconds of every tile, by its name, and of other systems that take turns with them.

    A tile that refuses the layer, or cannot be launched here, is left out.
    """
    systems = dict(beside or {})
    for tile in tiles_for(operands.layer.problem(out)):
        calls = operands.calls(out, tile.name)
        with contextlib.suppress(BackendError):
            calls[0]()
            systems[tile.name] = calls
    return microseconds(systems, rounds)


def tiles_for(problem: Problem) -> list[Tile]:
    """The tiles built for the current GPU that write the problem's output; int8's where there are
    none for int4 weights, which are then unpacked."""
    major, minor = torch.cuda.get_device_capability()
    units = build.available(f"{major}.{minor}")
    tiles = fitting(problem.op, problem.types, units)
    return [t for t in tiles or fitting(problem.op, "s8", units) if problem.out in t.outs]


def rows_of(problem: Problem, times: Mapping[str, Sequence[float]]) -> list[Row]:
    """The table's rows for the fastest tile: a float16 problem's count for bfloat16 as well."""
    best = min(times, key=lambda tile: median(times[tile]))
    rows: list[Row] = [(problem, best, times[best])]
    if problem.out == "f16":
        twin = best.replace("_out_f16_", "_out_bf16_")
        rows.append((replace(problem, out="bf16"), twin, times[best]))
    return rows


def keep(path: Path, gpu: str, rows: Iterable[Row]) -> None:
    """Write a table; this process uses it from now on."""
    write(path, gpu, rows)


def microseconds(systems: Mapping[str, Sequence[Call]], rounds: int = 7) -> Times:
    """Time of one call of each system on the current GPU, ``rounds`` times, in turns.

    A system's calls do the same on different tensors; they are repeated if they are few.
    """
    graphs = {name: _captured(calls) for name, calls in systems.items()}
    times: Times = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, (graph, count) in graphs.items():
            elapsed = _elapsed(graph) / count
            times[name] += [elapsed] if turn else []  # the first turn warms up
    return times


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls, after one warm-up each, and how many it has."""
    repeated = list(itertools.islice(itertools.cycle(calls), max(len(calls), _FEWEST)))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    return graph, len(repeated)


def _elapsed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay that is queued whole before it starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _with_tile(tile: str, call: Call) -> object:
    with forced(tile):
        return call()


def _integers(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
