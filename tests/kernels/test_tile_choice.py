"""Which tile is taken: a measured one near enough, else the estimate's, always one that can."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.kernels.cutlass import choose as choosing
from fxquant.kernels.cutlass.choose import Problem, choose, estimate, fitting, forced, to_try, write
from fxquant.kernels.cutlass.shapes import CONVS, LINEARS
from fxquant.kernels.cutlass.tiles import TILES
from fxquant.kernels.machine import Machine

HOPPER = Machine.named("cuda-sm90").cuda_kernels
AMPERE = Machine.named("cuda-sm80").cuda_kernels
GPU = "Test GPU 9"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    choosing.table.cache_clear()
    choosing._names.cache_clear()


@given(
    op=st.sampled_from(["gemm", "conv"]),
    out=st.sampled_from(["f32", "f16", "bf16", "s8"]),
    m=st.integers(1, 10**6),
    n=st.integers(1, 20000),
    k=st.integers(1, 1000).map(lambda k: 16 * k),
)
def test_the_tile_can_do_the_problem(op: str, out: str, m: int, n: int, k: int) -> None:
    problem = Problem(op, "s8", out, m, n, k)
    tile = choose(problem, HOPPER, GPU, 132)
    assert tile.family.startswith(op)
    assert tile.types == "s8"
    if "sm90a" in tile.family:
        assert out in tile.outs
        assert n % (16 if out == "s8" else 8) == 0


def test_a_library_that_is_not_built_is_not_chosen() -> None:
    one = frozenset({"gemm_sm80_s8_64x64x64"})
    assert choose(Problem("gemm", "s8", "f16", 8192, 8192, 1024), one, GPU, 132).m == 64
    with pytest.raises(LookupError, match="none of the libraries built for this GPU"):
        choose(Problem("conv", "s8", "f16", 64, 64, 64), one, GPU, 132)
    assert not fitting("gemm", "s4", HOPPER), "9.0 has no 4-bit units"
    assert fitting("gemm", "s4", AMPERE)


def test_large_problems_take_large_tiles_and_small_ones_fill_the_gpu() -> None:
    large = choose(Problem("gemm", "s8", "f16", 8192, 10240, 1280), AMPERE, GPU, 108)
    small = choose(Problem("gemm", "s8", "f16", 154, 320, 768), AMPERE, GPU, 108)
    assert large.m * large.n > small.m * small.n


def test_every_tile_is_the_best_for_something() -> None:
    """A tile that no layer of no UNet would take by estimate or table is dead weight."""
    problems = [
        Problem("gemm", types, out, row.m, row.n, row.k)
        for rows in LINEARS.values()
        for row in rows
        for types in ("s8", "s8s4", "s4")
        for out in ("f16", "bf16", "s8")
    ]
    problems += [
        Problem("conv", types, out, 2 * row.out**2, row.n, row.kernel**2 * row.channels)
        for rows in CONVS.values()
        for row in rows
        for types in ("s8", "s4")
        for out in ("f16", "bf16", "s8")
    ]
    taken = {
        choose(p, units, GPU, count).name
        for p in problems
        for units, count in ((HOPPER, 132), (AMPERE, 108), (AMPERE, 28))
        if fitting(p.op, p.types, units)
    }
    assert {tile.name for tile in TILES} - taken == set()


def test_a_measured_tile_goes_before_the_estimate() -> None:
    near, far = Problem("gemm", "s8", "f16", 4096, 640, 640), Problem("gemm", "s8", "f16", 2, 8, 16)
    able = fitting("gemm", "s8", AMPERE)
    slowest = max(able, key=lambda t: estimate(t, near, 108)).name
    write(choosing.tuned_path(GPU), GPU, [(near, slowest, [3.0, 3.1, 2.9])])
    assert choose(near, AMPERE, GPU, 108).name == slowest
    assert choose(Problem("gemm", "s8", "f16", 4000, 640, 640), AMPERE, GPU, 108).name == slowest
    assert choose(far, AMPERE, GPU, 108) == min(able, key=lambda t: estimate(t, far, 108))
    other = Problem("gemm", "s8", "s8", 4096, 640, 640)
    assert choose(other, AMPERE, GPU, 108) == min(able, key=lambda t: estimate(t, other, 108))
    assert choose(near, AMPERE, "Another GPU", 108).name != slowest


def test_a_forced_tile_is_forced_for_a_while_and_in_its_own_thread() -> None:
    problem, free = Problem("gemm", "s8", "f16", 2, 8, 16), []
    asked = (problem, AMPERE, GPU, 108)
    best = to_try(*asked)
    assert best == tuple(tile.name for tile in choosing.ranked(*asked))
    with contextlib.suppress(KeyError), forced("some_tile"):
        assert to_try(*asked) == ("some_tile",)
        with forced("another"):
            assert to_try(*asked) == ("another",)
        other = threading.Thread(target=lambda: free.append(to_try(*asked)))
        other.start()
        other.join()
        raise KeyError
    assert to_try(*asked) == best == free[0]


def test_a_new_table_is_used_at_once() -> None:
    problem = Problem("gemm", "s8", "f16", 4096, 640, 640)
    *_, slowest = to_try(problem, AMPERE, GPU, 108)
    write(choosing.tuned_path(GPU), GPU, [(problem, slowest, [3.0])])
    assert to_try(problem, AMPERE, GPU, 108)[0] == slowest


def test_a_measured_tile_that_is_not_built_is_passed_over() -> None:
    near = Problem("gemm", "s8", "f16", 4096, 640, 640)
    write(choosing.tuned_path(GPU), GPU, [(near, "gemm_sm80_s8_256x128x64", [1.0])])
    units = AMPERE - {"gemm_sm80_s8_256x128x64"}
    assert choose(near, units, GPU, 108).name in units
