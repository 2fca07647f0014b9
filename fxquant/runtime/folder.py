"""A folder that always holds the old saved model or the new one, whatever happens while saving.

`fxquant.json` names the other files, which carry the hash of their content in their names:
model-1f0c....safetensors, graph-93ab....json. Saving writes and syncs those under names that the
old model does not use, then replaces fxquant.json in one rename, then removes what it no longer
names. A process killed before the rename leaves the old model, after it the new one; what else it
left behind goes with the next save. One process saves at a time, and nobody reads meanwhile: the
folder is locked, where the file system can.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fxquant.errors import ArtifactError

try:
    import fcntl
except ImportError:  # not on Windows, where saving twice at a time is the user's to avoid
    fcntl = None  # type: ignore[assignment]

MANIFEST = "fxquant.json"
_CHUNK = 1 << 20
_DIGITS = 16
_HASH = f"[0-9a-f]{{{_DIGITS}}}"
FILE = re.compile(rf"model-{_HASH}\.safetensors|graph-{_HASH}\.json")
_TEMPORARY = ".fxquant-writing-"
_SHARED, _EXCLUSIVE = False, True


@dataclass(frozen=True)
class Written:
    """A file by its content: name, size in bytes, sha256 in hex."""

    name: str
    bytes: int
    sha256: str


class Writer:
    """Puts files into a locked folder; used by `writing`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: set[str] = set()
        self._new: set[str] = set()

    def add(self, kind: str, suffix: str, chunks: Iterable[memoryview | bytes]) -> Written:
        """Stream a file to disk, under the name KIND-HASH.SUFFIX."""
        temporary = self._folder / f"{_TEMPORARY}{kind}"
        digest, size = hashlib.sha256(), 0
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        sha256 = digest.hexdigest()
        name = f"{kind}-{sha256[:_DIGITS]}.{suffix}"
        if not (self._folder / name).exists():
            self._new.add(name)
        temporary.replace(self._folder / name)
        self._names.add(name)
        return Written(name, size, sha256)

    def publish(self, manifest: bytes) -> None:
        """Make the added files the folder's model."""
        temporary = self._folder / f"{_TEMPORARY}manifest"
        with temporary.open("wb") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self._folder)  # the files' names are on disk before anything refers to them
        temporary.replace(self._folder / MANIFEST)
        self._new.clear()
        _sync_folder(self._folder)

    def sweep(self) -> None:
        """Remove our files that are not part of the model: an old model's, a killed save's."""
        names = [path.name for path in self._folder.iterdir()]
        self._remove(n for n in names if FILE.fullmatch(n) and n not in self._names)
        self._remove(n for n in names if n.startswith(_TEMPORARY))

    def withdraw(self) -> None:
        """Remove what was added since the last publication."""
        self._remove(self._new)
        self._remove(path.name for path in self._folder.glob(f"{_TEMPORARY}*"))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # the next save tries again
                (self._folder / name).unlink()


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """Save into a folder, made if it does not exist: add files, then publish.

    Raises:
        ArtifactError: the folder cannot be written to, or the disk is full (the cause is chained);
            whatever was saved there before is untouched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, _EXCLUSIVE):
            writer = Writer(folder)
            try:
                yield writer
            except BaseException:
                writer.withdraw()
                raise
            writer.sweep()
    except OSError as error:
        raise ArtifactError(
            f"cannot save into {folder}: {error.strerror or error}. What was saved there before, "
            "if anything, is unchanged"
        ) from error


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep savers away meanwhile.

    Raises:
        ArtifactError: there is no such folder, or an error of the operating system within.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {what}; give the folder that save_pretrained wrote")
    try:
        with _locked(folder, _SHARED):
            yield
    except OSError as error:
        raise ArtifactError(f"cannot read from {folder}: {error.strerror or error}") from error


@contextmanager
def opened(folder: Path, name: str) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a file.

    Raises:
        ArtifactError: there is no such file, or it is something else.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(folder / name, flags)
    except FileNotFoundError:
        raise ArtifactError(f"{folder / name}: missing. Copy or save the model again") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep us waiting
            raise ArtifactError(f"{folder / name}: not a file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def content(descriptor: int, size: int) -> bytes:
    """All of a file that is small."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while size > 0 and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def hash_of(descriptor: int) -> str:
    """sha256 of a whole file, read a chunk at a time."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    digest, chunk = hashlib.sha256(), bytearray(_CHUNK)
    with os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path, exclusive: bool) -> Iterator[None]:
    """Hold the folder's lock; without one where there are none (some network file systems)."""
    if fcntl is None:
        yield  # type: ignore[unreachable]
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # it cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems sync files only
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
