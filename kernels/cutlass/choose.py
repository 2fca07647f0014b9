"""Which tile multiplies a problem: a measured table where there is one, else an estimate.

A table is a JSON file of rows (problem, tile), for one model of GPU. Ours lie in measured/ beside
this file; `tune` measures the user's GPU into the cache, which goes before ours. A problem that is
not in the table takes the tile of the nearest one of its kind; one that is far from all of them,
or whose GPU has no table, takes the tile of the least estimated time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

from fxquant.kernels import jit
from fxquant.kernels.cutlass.tiles import TILES, Tile

_MEASURED = Path(__file__).with_name("measured")
_NEAR = math.log(4)  # a problem takes a neighbour's tile if their sizes differ by less, together
_forced: ContextVar[str | None] = ContextVar("the forced tile", default=None)
_WGMMA = {"gemm": 1.7, "conv": 1.2}  # of mma.sync's rate on a 9.0, assumed until it is measured


@dataclass(frozen=True)
class Problem:
    """What is to be multiplied: ``m`` rows of ``k`` integers by ``n`` channels.

    ``op`` is gemm or conv, ``types`` as in `Tile`, ``out`` f32, f16, bf16 or s8.
    """

    op: str
    types: str
    out: str
    m: int
    n: int
    k: int

    @property
    def kind(self) -> tuple[str, str, str]:
        return (self.op, self.types, self.out)


def fitting(op: str, types: str, units: frozenset[str]) -> list[Tile]:
    """The tiles for an operation among the libraries that are there."""
    return [t for t in TILES if t.family.startswith(op) and t.types == types and t.name in units]


def choose(problem: Problem, units: frozenset[str], gpu: str, multiprocessors: int) -> Tile:
    """The first of `ranked`. Raises LookupError if there is none."""
    able = ranked(problem, units, gpu, multiprocessors)
    if not able:
        raise LookupError(f"none of the libraries built for this GPU can do {problem}")
    return able[0]


def ranked(problem: Problem, units: frozenset[str], gpu: str, multiprocessors: int) -> list[Tile]:
    """The tiles for a problem on the GPU of that name, best first: measured, then as estimated."""
    able = [t for t in fitting(problem.op, problem.types, units) if _writes(t, problem)]
    able.sort(key=lambda tile: estimate(tile, problem, multiprocessors))
    named = {tile.name: tile for tile in able}
    known = (row for row in table(gpu).items() if row[0].kind == problem.kind and row[1] in named)
    nearest = min(known, key=lambda row: _distance(row[0], problem), default=None)
    if nearest and _distance(nearest[0], problem) < _NEAR:
        able.sort(key=lambda tile: tile.name != nearest[1])  # stable: the others keep their order
    return able


def to_try(
    problem: Problem, units: frozenset[str], gpu: str, multiprocessors: int
) -> tuple[str, ...]:
    """The names of `ranked`, worked out once for each problem; or the tile that is `forced`."""
    tile = _forced.get()
    return _names(problem, units, gpu, multiprocessors) if tile is None else (tile,)


@contextlib.contextmanager
def forced(tile: str) -> Iterator[None]:
    """Every product of this thread takes the tile, or is refused by it."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.lru_cache(maxsize=4096)
def _names(
    problem: Problem, units: frozenset[str], gpu: str, multiprocessors: int
) -> tuple[str, ...]:
    return tuple(tile.name for tile in ranked(problem, units, gpu, multiprocessors))


def _writes(tile: Tile, problem: Problem) -> bool:
    whole = problem.n % (16 if problem.out == "s8" else 8) == 0  # rows of whole 16 bytes
    return problem.out in tile.outs and (tile.any_n or whole)


def estimate(tile: Tile, problem: Problem, multiprocessors: int) -> float:
    """Relative time: blocks run in waves over the multiprocessors, the larger the more efficient.

    A block of a x b results reads (a + b) / ab integers per product, which sets its rate.
    """
    blocks = math.ceil(problem.m / tile.m) * math.ceil(problem.n / tile.n)
    waves = math.ceil(blocks / multiprocessors)
    reuse = tile.m * tile.n / (tile.m + tile.n)
    rate = reuse / (reuse + 24) * (_WGMMA[problem.op] if "sm90a" in tile.family else 1.0)
    return waves * tile.m * tile.n * (problem.k + 2 * tile.k) / rate


def _distance(a: Problem, b: Problem) -> float:
    sizes = zip((a.m, a.n, a.k), (b.m, b.n, b.k), strict=True)
    return sum(abs(math.log(max(x, 1) / max(y, 1))) for x, y in sizes)


@functools.cache
def table(gpu: str) -> Mapping[Problem, str]:
    """The measured tiles of a GPU by problem: those of the cache, else ours; empty if none."""
    for path in (tuned_path(gpu), _MEASURED / _file(gpu)):
        if path.is_file():
            rows = json.loads(path.read_text())["rows"]
            return {Problem(**row["problem"]): row["tile"] for row in rows}
    return {}


def tuned_path(gpu: str) -> Path:
    """Where `tune` keeps what it measured."""
    return jit.cache_dir() / _file(gpu)


def write(path: Path, gpu: str, rows: Iterable[tuple[Problem, str, Sequence[float]]]) -> None:
    """Keep a table: each problem, its best tile, and the microseconds of the runs behind it."""
    plain = [
        {"problem": asdict(problem), "tile": tile, "microseconds": list(times)}
        for problem, tile, times in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu, "rows": plain}, indent=1) + "\n")
    table.cache_clear()
    _names.cache_clear()


def _file(gpu: str) -> str:
    return "tiles-" + re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"
