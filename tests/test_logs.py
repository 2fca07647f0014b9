"""FXQUANT_LOG, where messages go, and when progress bars show."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from fxquant import logs
from fxquant.errors import SettingError

NAMES = ("fxquant", "fxquant.graph")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Levels and handlers as they were afterwards."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(x.level, x.handlers[:]) for x in loggers]
    for x in loggers:
        x.handlers = []
    yield
    for x, (level, handlers) in zip(loggers, before, strict=True):
        x.setLevel(level)
        x.handlers = handlers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("setting", "levels"),
    [
        ("", {}),
        ("debug", {"fxquant": "debug"}),
        ("INFO", {"fxquant": "info"}),
        ("fxquant.graph=debug", {"fxquant.graph": "debug"}),
        (" info , fxquant.graph=debug,", {"fxquant": "info", "fxquant.graph": "debug"}),
    ],
)
def test_settings(setting, levels):
    assert logs.parse(setting) == levels


@pytest.mark.parametrize("setting", ["debg", "fxquant.graph=debg", "info,debg"])
def test_an_unknown_level_gets_a_near_one(setting):
    with pytest.raises(SettingError, match=r"FXQUANT_LOG: unknown level 'debg'.*mean 'debug'"):
        logs.parse(setting)


def test_a_foreign_logger_is_refused_with_the_name_to_write():
    with pytest.raises(SettingError, match=r"'graph' is not one .* write fxquant\.graph=debug"):
        logs.parse("graph=debug")


def test_the_variable_sets_levels(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv(logs.VARIABLE, "warning,fxquant.graph=info")
    logs.configure()
    logging.getLogger("fxquant.graph.runner").info("seen %d", 1)
    logging.getLogger("fxquant.runtime").info("unseen")
    logging.getLogger("fxquant.runtime").warning("careful")
    assert capsys.readouterr().err == "fxquant: seen 1\nfxquant: warning: careful\n"


def test_configuring_twice_writes_once(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logs.configure("info")
    logs.configure("info")
    logging.getLogger("fxquant").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_an_application_keeps_its_own_handlers(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    logs.configure("info")
    assert logging.getLogger("fxquant").handlers == []
    assert logging.getLogger("fxquant").level == logging.INFO


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options: bool) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    assert list(logs.progress(range(3), "work", "piece", **options)) == [0, 1, 2]
    return stream.getvalue()


def test_a_bar_with_the_time_left_shows_on_a_terminal(monkeypatch):
    monkeypatch.setattr(logs, "_PATIENCE", 0)
    text = shown(monkeypatch, Terminal())
    assert "work:   0%" in text
    assert "<" in text  # elapsed<remaining


def test_no_bar_for_what_is_quick(monkeypatch):
    assert "work" not in shown(monkeypatch, Terminal())


def test_no_bar_without_a_terminal(monkeypatch):
    monkeypatch.setattr(logs, "_PATIENCE", 0)
    assert shown(monkeypatch, io.StringIO()) == ""


def test_no_bar_if_not_wanted(monkeypatch):
    monkeypatch.setattr(logs, "_PATIENCE", 0)
    assert shown(monkeypatch, Terminal(), show=False) == ""
