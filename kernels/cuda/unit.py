"""What is compiled for GPUs, as data: one unit is one shared library."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.kernels.cuda import call

ARCHES = ("80", "86", "89", "90", "90a")
"""What can be compiled for, as nvcc spells it. 90a has instructions that plain 90 lacks."""


@dataclass(frozen=True)
class Probe:
    """A call that a library is asked about before it is kept, and whether it must accept it."""

    what: str
    fields: tuple[tuple[str, int], ...]
    """What is unlike in `call.example`, under the names of Call and Epilogue."""
    accepted: bool


@dataclass(frozen=True)
class Unit:
    """One library: a source below kernels/, compiled with defines for each of its architectures."""

    name: str
    source: str
    archs: tuple[str, ...] = ARCHES
    defines: tuple[tuple[str, int], ...] = ()
    opcodes: tuple[str, ...] = ()
    """Regular expressions, each of which the machine code must match."""
    probes: tuple[Probe, ...] = ()
    gibibytes: float = 1.0
    """What compiling it takes at its peak, about."""
    abi_version: int = call.ABI

    @property
    def uses_cutlass(self) -> bool:
        return self.source.startswith("cutlass/")


PRODUCERS = Unit("producers", "cuda/producers.cu")
WEIGHTS = Unit("weights", "cuda/weights.cu")
