"""Whatever happens while a model is saved, the folder holds the old one or the new one."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

import fxquant
from fxquant.errors import ArtifactError
from tests.runtime import saved

KILLED = 9


def in_child(work: Callable[[], None]) -> int:
    """Process id of a fork that does the work and vanishes without cleaning up."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def step_by_step(monkeypatch: pytest.MonkeyPatch, hook: Callable[[], None]) -> None:
    """Call `hook` before everything that a save does to the disk."""

    def before(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            hook()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, hooked)

    for owner, name in ((Path, "replace"), (Path, "open"), (Path, "unlink"), (os, "fsync")):
        before(owner, name)


def test_a_save_killed_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = saved.mite(0), saved.mite(1)
    old.save_pretrained(tmp_path)
    found = []
    for step in range(100):
        steps = iter([None] * step)

        def die() -> None:
            if next(steps, "now") == "now":  # noqa: B023 - the child sees this round's
                os._exit(KILLED)

        with monkeypatch.context() as patch:
            step_by_step(patch, die)
            _, status = os.waitpid(in_child(lambda: new.save_pretrained(tmp_path)), 0)
        found.append(saved.same_model(tmp_path, [old, new]))
        if os.waitstatus_to_exitcode(status) != KILLED:
            break
        old.save_pretrained(tmp_path)  # which also sweeps up
        assert len(saved.files(tmp_path)) == 3
    assert len(found) > 10
    assert found[0] is old
    assert found[-1] is new
    assert found == sorted(found, key=lambda model: model is new)  # never back and forth


def kill_while_saving(folder: Path, moments: int) -> None:
    """kill -9 at random moments of a process that saves two models by turns."""
    models = [saved.mite(0), saved.mite(1)]
    models[0].save_pretrained(folder)
    chance = random.Random(0)
    for _ in range(moments):

        def save_forever() -> NoReturn:
            while True:
                for model in models:
                    model.save_pretrained(folder)

        process = in_child(save_forever)
        time.sleep(chance.uniform(0.01, 0.15))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        saved.same_model(folder, models)
    models[0].save_pretrained(folder)
    assert saved.same_model(folder, models) is models[0]
    assert len(saved.files(folder)) == 3


def test_a_save_killed_at_three_random_moments(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 3)


@pytest.mark.slow
def test_a_save_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 20)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses to let any file grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_leaves_everything_as_it_was(tmp_path: Path) -> None:
    old, new = saved.mite(0), saved.mite(1)
    old.save_pretrained(tmp_path)
    before = saved.files(tmp_path)
    for size in (0, 100, 5000, max(map(len, before.values())) - 1):
        with largest_file(size), pytest.raises(ArtifactError, match="File too large") as caught:
            new.save_pretrained(tmp_path)
        assert isinstance(caught.value.__cause__, OSError)
        assert saved.files(tmp_path) == before


def test_an_error_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, as any of the calls may report it."""
    old, new = saved.mite(0), saved.mite(1)
    old.save_pretrained(tmp_path)
    failed = 0
    for step in range(100):
        steps = iter([None] * step)

        def fill_up() -> None:
            if next(steps, "now") == "now":  # noqa: B023 - used within the round
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        error = None
        with monkeypatch.context() as patch:
            step_by_step(patch, fill_up)
            try:
                new.save_pretrained(tmp_path)
            except ArtifactError as caught:
                error = caught
        holds = saved.same_model(tmp_path, [old, new])
        if error is None:
            assert holds is new
            break
        failed += 1
        assert "No space left on device" in str(error)
        assert isinstance(error.__cause__, OSError)
        assert holds is old
        old.save_pretrained(tmp_path)
        assert len(saved.files(tmp_path)) == 3
    assert failed > 5


@pytest.mark.parametrize("place", ["/proc/nowhere/model", "/proc/self/attr"])
def test_a_place_that_takes_no_files(place: str) -> None:
    with pytest.raises(ArtifactError, match="cannot save into /proc") as caught:
        saved.mite().save_pretrained(place)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom permissions do not stop."""
    saved.mite(0).save_pretrained(tmp_path)

    def refuse(path: Path, mode: str = "r", *_: Any, **__: Any) -> Any:
        assert "w" in mode
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ArtifactError, match="Read-only file system"):
            saved.mite(1).save_pretrained(tmp_path)
    assert saved.same_model(tmp_path, [saved.mite(0)])


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot save into"):
        saved.mite().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_saving_over_another_model_leaves_no_trace_of_it_and_other_files_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model-card.txt").write_text("mine")
    saved.mite(0).save_pretrained(tmp_path)
    first = set(saved.files(tmp_path))
    saved.mite(1).save_pretrained(tmp_path)
    second = set(saved.files(tmp_path))
    assert len(first) == len(second) == 5
    assert first & second >= {"README.md", "model-card.txt", "fxquant.json"}
    saved.mite(1).save_pretrained(tmp_path)
    assert set(saved.files(tmp_path)) == second


def test_a_loaded_model_saves_over_its_own_files(tmp_path: Path) -> None:
    model = saved.mite()
    model.save_pretrained(tmp_path)
    before = saved.files(tmp_path)
    loaded = fxquant.load(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert saved.files(tmp_path) == before
    saved.check_same_tensors(model, loaded)


def test_saving_and_loading_at_the_same_time(tmp_path: Path) -> None:
    models = [saved.mite(0), saved.mite(1)]
    models[0].save_pretrained(tmp_path)
    errors: list[BaseException] = []

    def keep(work: Callable[[], Any], times: int) -> None:
        try:
            for _ in range(times):
                work()
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    works = [(lambda m=m: m.save_pretrained(tmp_path), 30) for m in models]
    works += [(lambda: saved.same_model(tmp_path, models), 10)]
    threads = [threading.Thread(target=keep, args=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert saved.same_model(tmp_path, models)
    assert len(saved.files(tmp_path)) == 3
