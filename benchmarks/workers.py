"""Processes that each hold one system and run a step of it when asked, over a pipe.

The process that measures keeps several of them; those that are not asked sleep, so that systems
take turns on one machine and each has a memory of its own to account for.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common import GIB, resident_of_group

Command = Callable[..., Any]


class NotMeasured(Exception):  # noqa: N818 - an outcome to report, with its reason
    """A system that cannot be measured here; the message says why."""


class Worker:
    """A process that answers commands.

    Args:
        arguments: of the python interpreter: a script that calls `answer`, and its options.
        log: file for what it prints.
        limit: bytes that it and `others` may hold together; beyond that it is stopped.
        others: bytes held by the processes that are alive beside this one.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        limit: float = float("inf"),
        others: Callable[[Worker], int] = lambda _: 0,
    ):
        self._limit, self._others = limit, others
        with log.open("ab") as beside:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=beside,
                start_new_session=True,
            )

    @property
    def resident(self) -> int:
        """Bytes that it holds now, and what it started."""
        return resident_of_group(self._process.pid)

    def ask(self, command: str, **values: Any) -> Any:
        """Its answer.

        Raises:
            NotMeasured: it failed, died, or took more memory than there is.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([command, values]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise NotMeasured(self._end()) from None
        while not select.select([self._process.stdout], [], [], 0.5)[0]:
            self._check_memory()
        line = self._process.stdout.readline()
        if not line:
            raise NotMeasured(self._end())
        answer = json.loads(line)
        if "error" in answer:
            raise NotMeasured(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End it, and what it may have started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _check_memory(self) -> None:
        held = self.resident + self._others(self)
        if held > self._limit:
            self.close()
            raise NotMeasured(
                f"needs more than the {self._limit / GIB:.0f} GiB that it was allowed"
            )

    def _end(self) -> str:
        code = self._process.wait()
        return f"its process was ended by signal {-code}" if code < 0 else f"it exited with {code}"


def answer(commands: dict[str, Command]) -> None:
    """Serve the commands until standard input ends; what they print goes to standard error."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, values = json.loads(line)
        try:
            result = {"result": commands[name](**values)}
        except Exception as error:  # noqa: BLE001 - every reason is reported, none ends the run
            result = {"error": reason(error)}
        pipe.write(json.dumps(result) + "\n")
        pipe.flush()


def reason(error: BaseException) -> str:
    """An exception in a line; its traceback goes to the log."""
    import traceback

    traceback.print_exception(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def take_turns(
    workers: dict[str, Worker], rounds: int, note: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every round by system, and why those that failed did; a first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        started = time.monotonic()
        for name in [n for n in workers if n not in failed]:
            try:
                seconds = workers[name].ask("step")
            except NotMeasured as error:
                failed[name] = str(error)
            else:
                times[name] += [seconds] if turn else []
        note(f"round {turn} of {rounds}, {time.monotonic() - started:.1f} s")
    return times, failed
