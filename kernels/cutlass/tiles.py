"""Every GEMM and convolution that is compiled, as a table.

A row is a tile: the block of the result that one thread block makes at a time, and how. Families:
``gemm_sm80`` and ``conv_sm80`` (mma.sync, for every GPU since 8.0) write any type of output;
``gemm_sm90a`` and ``conv_sm90a`` (TMA and wgmma, for 9.0 alone) the one they are compiled for.
Types: ``s8``; ``s8s4``, int8 activations and int4 weights; ``s4``, both int4, which 9.0 only
emulates. The sm90a families are for ``s8``: wgmma takes no int4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fxquant.kernels.cuda import call
from fxquant.kernels.cuda.unit import Probe, Unit

_TYPES = {"s8": 0, "s8s4": 1, "s4": 2}
_SCHEDULES = {"cooperative": 0, "pingpong": 1, "one_consumer": 2}
_OUT = {"f32": call.FLOAT32, "f16": call.FLOAT16, "bf16": call.BFLOAT16, "s8": call.INT8}
_IMMA = {
    "s8": r"\bIMMA\.16832\.S8\.S8\b",
    "s8s4": r"\bIMMA\.16832\.S8\.S8\b",
    "s4": r"\bIMMA\.16864\.S4\.S4\b",
}
_IGMMA = r"\bIGMMA\.\S*\.S8\.S8\b"
_IM2COL = r"\bUTMALDG\.\S*IM2COL"


@dataclass(frozen=True)
class Tile(ABC):
    """A row of the table: the block of m x n results, k at a time."""

    family: str
    types: str
    m: int
    n: int
    k: int

    @property
    def is_conv(self) -> bool:
        return self.family.startswith("conv")

    @property
    def outs(self) -> tuple[str, ...]:
        """The types of output that it writes."""
        return tuple(_OUT)

    @property
    def any_n(self) -> bool:
        """Whether it writes rows that are no multiple of 16 bytes."""
        return True

    @property
    def name(self) -> str:
        """The unit's name."""
        return f"{self.family}_{self.types}_{self.m}x{self.n}x{self.k}"

    @property
    def unit(self) -> Unit:
        """The library that it is compiled to."""
        return Unit(
            name=self.name,
            source=f"cutlass/{self.family}.cu",
            archs=self._archs(),
            defines=(
                ("FXQUANT_TILE_M", self.m),
                ("FXQUANT_TILE_N", self.n),
                ("FXQUANT_TILE_K", self.k),
                ("FXQUANT_TYPES", _TYPES[self.types]),
                *self._defines(),
            ),
            opcodes=self._opcodes(),
            probes=_probes(self),
            gibibytes=self._gibibytes(),
        )

    @abstractmethod
    def _archs(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _defines(self) -> tuple[tuple[str, int], ...]: ...

    @abstractmethod
    def _opcodes(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _gibibytes(self) -> float: ...


@dataclass(frozen=True)
class Sm80Tile(Tile):
    """Warps of warp_m x warp_n results each; so many stages of shared memory."""

    warp_m: int
    warp_n: int
    stages: int

    def _archs(self) -> tuple[str, ...]:
        native = ("80", "86", "89")
        return native if self.types == "s4" else (*native, "90")

    def _defines(self) -> tuple[tuple[str, int], ...]:
        return (
            ("FXQUANT_WARP_M", self.warp_m),
            ("FXQUANT_WARP_N", self.warp_n),
            ("FXQUANT_STAGES", self.stages),
        )

    def _opcodes(self) -> tuple[str, ...]:
        return (_IMMA[self.types],)

    def _gibibytes(self) -> float:
        return 1.3


@dataclass(frozen=True)
class Sm90aTile(Tile):
    """A cluster of cluster_m x cluster_n blocks shares its loads; one type of output."""

    cluster_m: int
    cluster_n: int
    schedule: str
    out: str

    @property
    def outs(self) -> tuple[str, ...]:
        return (self.out,)

    @property
    def any_n(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"{self.family}_{self.types}_out_{self.out}_{self.m}x{self.n}x{self.k}"

    def _archs(self) -> tuple[str, ...]:
        return ("90a",)

    def _defines(self) -> tuple[tuple[str, int], ...]:
        return (
            ("FXQUANT_CLUSTER_M", self.cluster_m),
            ("FXQUANT_CLUSTER_N", self.cluster_n),
            ("FXQUANT_SCHEDULE", _SCHEDULES[self.schedule]),
            ("FXQUANT_OUT", _OUT[self.out]),
        )

    def _opcodes(self) -> tuple[str, ...]:
        return (_IGMMA, _IM2COL) if self.is_conv else (_IGMMA,)

    def _gibibytes(self) -> float:
        return 4.2


def _probes(tile: Tile) -> tuple[Probe, ...]:
    sizes = _conv_sizes if tile.is_conv else _linear_sizes
    step = 16 if tile.types == "s8" else 32  # integers in 16 bytes, of the narrower operand
    good = {**sizes(640, 320), "out_type": _OUT[tile.outs[0]]}
    if good["out_type"] == call.INT8:
        good["out_index"] = 1
    refused = {
        "k is off its alignment": sizes(640 + step // 2, 320),
        "x is off its alignment": {"x": (1 << 20) + 4},
        "weight is off its alignment": {"weight": (1 << 20) + 4},
        "out is off its alignment": {"out": (1 << 20) + 1},
        "another version": {"version": call.ABI + 1},
        "an output type that there is not": {"out_type": 99},
    }
    return (
        *(_probe(f"{out} out", good, _writes(out), accepted=True) for out in tile.outs),
        _probe("k is the shortest", good, sizes(step, 320), accepted=True),
        _probe("n is odd", good, sizes(640, 321), accepted=tile.any_n),
        *(_probe(what, good, fields, accepted=False) for what, fields in refused.items()),
    )


def _probe(what: str, base: dict[str, int], changed: dict[str, int], *, accepted: bool) -> Probe:
    return Probe(what, tuple({**base, **changed}.items()), accepted)


def _writes(out: str) -> dict[str, int]:
    return {"out_type": _OUT[out], "out_index": 1 if out == "s8" else -1}


def _linear_sizes(k: int, n: int) -> dict[str, int]:
    return {"m": 154, "n": n, "k": k}


def _conv_sizes(channels: int, n: int) -> dict[str, int]:
    """A 3x3 convolution, padded, of two images of 32x24."""
    image = {"batch": 2, "height": 32, "width": 24, "channels": channels}
    window = dict.fromkeys(
        ("stride_h", "stride_w", "dilation_h", "dilation_w", "pad_top", "pad_left"), 1
    )
    out = {"kernel_h": 3, "kernel_w": 3, "out_height": 32, "out_width": 24}
    return {**image, **window, **out, "m": 2 * 32 * 24, "n": n, "k": 9 * channels}


def _sm90a(
    family: str, types: str, shape: tuple[int, int, int], cluster: tuple[int, int], schedule: str
) -> tuple[Sm90aTile, ...]:
    return tuple(
        Sm90aTile(family, types, *shape, *cluster, schedule, out) for out in ("f16", "bf16", "s8")
    )


TILES: tuple[Tile, ...] = (
    Sm80Tile("gemm_sm80", "s8", 128, 128, 64, warp_m=64, warp_n=64, stages=4),
    Sm80Tile("gemm_sm80", "s8", 256, 128, 64, warp_m=64, warp_n=64, stages=3),
    Sm80Tile("gemm_sm80", "s8", 128, 64, 64, warp_m=64, warp_n=32, stages=5),
    Sm80Tile("gemm_sm80", "s8", 64, 64, 64, warp_m=32, warp_n=32, stages=5),
    Sm80Tile("gemm_sm80", "s8s4", 128, 128, 64, warp_m=64, warp_n=64, stages=4),
    Sm80Tile("gemm_sm80", "s8s4", 64, 64, 64, warp_m=32, warp_n=32, stages=5),
    Sm80Tile("gemm_sm80", "s4", 128, 128, 128, warp_m=64, warp_n=64, stages=4),
    Sm80Tile("gemm_sm80", "s4", 64, 64, 128, warp_m=32, warp_n=32, stages=5),
    Sm80Tile("conv_sm80", "s8", 128, 128, 64, warp_m=64, warp_n=64, stages=4),
    Sm80Tile("conv_sm80", "s8", 256, 128, 64, warp_m=64, warp_n=64, stages=3),
    Sm80Tile("conv_sm80", "s8", 128, 64, 64, warp_m=64, warp_n=32, stages=5),
    Sm80Tile("conv_sm80", "s8", 64, 64, 64, warp_m=32, warp_n=32, stages=5),
    Sm80Tile("conv_sm80", "s4", 128, 128, 128, warp_m=64, warp_n=64, stages=4),
    Sm80Tile("conv_sm80", "s4", 64, 64, 128, warp_m=32, warp_n=32, stages=5),
    *_sm90a("gemm_sm90a", "s8", (128, 128, 128), (2, 1), "cooperative"),
    *_sm90a("gemm_sm90a", "s8", (64, 128, 128), (1, 1), "pingpong"),
    *_sm90a("gemm_sm90a", "s8", (128, 256, 128), (2, 1), "cooperative"),
    *_sm90a("conv_sm90a", "s8", (128, 128, 128), (1, 1), "one_consumer"),
    *_sm90a("conv_sm90a", "s8", (64, 128, 128), (1, 1), "one_consumer"),
)
