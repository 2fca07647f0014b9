"""Logging and progress.

FXQUANT_LOG sets levels: `debug` for all of fxquant, `fxquant.graph=debug,fxquant.runtime=info` by
logger, or both (`info,fxquant.graph=debug`). Without it only warnings show. Everything goes to
standard error; progress bars only to a terminal, and only for what takes over two seconds.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from fxquant.errors import SettingError, near

VARIABLE = "FXQUANT_LOG"
ROOT = "fxquant"
LEVELS = ("debug", "info", "warning", "error", "critical")
log = logging.getLogger(__name__)
_PATIENCE = 2.0  # seconds before a progress bar appears


class Clock:
    """Wall time by phase: `with clock("capture"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        log.info("%s: %.1f s", phase, seconds)


def configure(setting: str | None = None) -> None:
    """Set levels and give fxquant's loggers a way to standard error. Repeating it is harmless.

    Loggers of an application that configured `logging` itself keep its handlers.

    Args:
        setting: what FXQUANT_LOG says, by default.

    Raises:
        SettingError: an unknown level, or a logger that is not fxquant's.
    """
    setting = os.environ.get(VARIABLE, "") if setting is None else setting
    for name, level in parse(setting).items():
        logging.getLogger(name).setLevel(level.upper())
    root = logging.getLogger(ROOT)
    if not logging.getLogger().handlers and not root.handlers:
        root.addHandler(_AboveBars())


def parse(setting: str) -> dict[str, str]:
    """Level by logger: "info,fxquant.graph=debug" -> {"fxquant": "info", "fxquant.graph": "debug"}.

    Raises:
        SettingError: see `configure`.
    """
    levels = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        name, equals, level = item.rpartition("=")
        name = name if equals else ROOT
        if level.lower() not in LEVELS:
            raise SettingError(f"{VARIABLE}: unknown level {level!r}.{near(level, LEVELS)}")
        if name.split(".")[0] != ROOT:
            raise SettingError(
                f"{VARIABLE}: {name!r} is not one of fxquant's loggers; write {ROOT}.{name}={level}"
            )
        levels[name] = level.lower()
    return levels


def progress(
    items: Iterable[Any] | None = None,
    what: str = "",
    unit: str = "it",
    total: int | None = None,
    show: bool = True,
) -> tqdm[Any]:
    """A bar with the time left, over `items` or counted by hand up to `total`.

    It appears after two seconds and only if standard error is a terminal; `show=False` never.
    """
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        delay=_PATIENCE,
        disable=None if show else True,
        leave=False,
    )


class _AboveBars(logging.Handler):
    """Writes to what sys.stderr is at the time, without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(f"fxquant: {level}{record.getMessage()}", file=sys.stderr)
