"""Makes a failing program smaller: leaves out statement after statement while it fails alike."""

from __future__ import annotations

import time
from dataclasses import replace

from tests.fuzz.law import Finding, check
from tests.fuzz.writer import Program


def minimise(program: Program, cause: str, seconds: float = 60.0) -> Program:
    """The smallest program found in that time that still fails for that cause."""
    until = time.monotonic() + seconds
    shrunk = True
    while shrunk and time.monotonic() < until:
        shrunk = False
        for candidate in _smaller(program):
            if time.monotonic() > until:
                break
            if cause_of(candidate) == cause:
                program, shrunk = candidate, True
                break
    return program


def cause_of(program: Program) -> str:
    """Why a program breaks the law; empty if it does not, or is no program any more."""
    try:
        check(program.source)
    except Finding as finding:
        return finding.cause
    except Exception:  # noqa: BLE001 - without a statement it may be no program
        return ""
    return ""


def _smaller(program: Program) -> list[Program]:
    found = []
    for index in reversed(range(len(program.statements))):
        found += program.without(index)
    read = [a for k, a in enumerate(program.arguments) if k == 0 or _is_used(program, a.name)]
    if len(read) < len(program.arguments):
        found.insert(0, replace(program, arguments=tuple(read)))
    if program.dtype != "float32":
        found.append(replace(program, dtype="float32"))
    return found


def _is_used(program: Program, name: str) -> bool:
    return any(statement.reads(name) for statement in program.statements)
