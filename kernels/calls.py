"""Calls of compiled functions, which can be written down to be repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Call = Callable[[], object]

_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


def call(function: Callable[..., object], *arguments: object) -> None:
    """``function(*arguments)``, whose results are in memory that the arguments point to."""
    function(*arguments)
    calls = _calls.get()
    if calls is not None:
        calls.append(functools.partial(function, *arguments))


@contextmanager
def written_down(calls: list[Call] | None) -> Iterator[None]:
    """Within, what this thread calls by `call` is added to ``calls``; of None to nothing."""
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)
