"""Looks at a compiled library before it is kept: nvcc's success says little.

nvcc builds code for 90a as a stub for plain 90, emulates int4 products where there are none, and
spills registers, all without a warning. So the machine code must hold the instructions that the
unit is about, and nothing that goes through a thread's local memory; and the library's own host
code must answer as it should, which needs no GPU.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from fxquant.kernels.cuda import call, nvcc
from fxquant.kernels.cuda.unit import Unit
from fxquant.kernels.jit import KernelBuildError

SHARED_MEMORY_CAP = {"80": 163, "86": 99, "89": 99, "90": 227, "90a": 227}
"""KiB that one block can have."""

_NAME = 60
_FUNCTION = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_CODE = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_PRODUCT = re.compile(r"\b(?:[A-Z]+MMA|UTMALDG)\.[.\w]+")
_LOCAL = re.compile(r"\b(?:STL|LDL)\b\S*")


def check(library: Path, unit: Unit, arch: str) -> None:
    """Raises KernelBuildError, naming the check, the kernel and what was found."""
    found = _problem(library, unit, arch)
    if found:
        raise KernelBuildError(f"{unit.name} for {arch} compiled, but fails the gate: {found}")


def _problem(library: Path, unit: Unit, arch: str) -> str | None:
    code = nvcc.cuobjdump(library, "-sass")
    return (
        _other_architecture(code, arch)
        or _missing_opcode(code, unit)
        or _local_memory(code, nvcc.cuobjdump(library, "-res-usage"))
        or (_host_answers(library, unit, arch) if unit.probes else None)
    )


def _other_architecture(code: str, arch: str) -> str | None:
    found = sorted(set(re.findall(r"code for sm_(\w+)", code)))
    if found == [arch] and _CODE.search(code):
        return None
    return f"it should hold kernels for {arch}, and holds {', '.join(found) or 'none'}"


def _missing_opcode(code: str, unit: Unit) -> str | None:
    missing = [opcode for opcode in unit.opcodes if not re.search(opcode, code)]
    if not missing:
        return None
    alike = sorted(set(_PRODUCT.findall(code)))
    return (
        f"no instruction is like {missing[0]} in {', '.join(_names(code))}; "
        f"of its kind there are {', '.join(alike) or 'none'}"
    )


def _local_memory(code: str, usage: str) -> str | None:
    if len(_FUNCTION.findall(usage)) < len(_names(code)):
        return "cuobjdump does not tell the resources of every kernel, so they cannot be checked"
    for name, registers, stack, local in _FUNCTION.findall(usage):
        if int(stack) or int(local):
            return (
                f"{_short(name)} keeps {stack} bytes on a stack and {local} in local memory, "
                f"with {registers} registers; it must have 0"
            )
    spill = _LOCAL.search(code)
    return f"{_names(code[: spill.start()])[-1]} spills: it has {spill[0]}" if spill else None


def _host_answers(library: Path, unit: Unit, arch: str) -> str | None:
    opened = ctypes.CDLL(str(library))
    memory, cap = opened.fxquant_shared_memory(), SHARED_MEMORY_CAP[arch] * 1024
    if not 0 < memory <= cap:
        return f"a block takes {memory} bytes of shared memory; a GPU of {arch} gives {cap}"
    for probe in unit.probes:
        status = opened.fxquant_can_run(ctypes.byref(call.example(probe.fields)))
        if (status == call.OK) != probe.accepted:
            answer = "accepts" if status == call.OK else f"refuses (status {status})"
            return f"fxquant_can_run {answer} a call with: {probe.what}"
    return None


def _names(code: str) -> list[str]:
    return [_short(name) for name in _CODE.findall(code)]


def _short(name: str) -> str:
    """CUTLASS's names have thousands of letters."""
    return name if len(name) <= _NAME else f"{name[:_NAME]}..."
