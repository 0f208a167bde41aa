"""Temporary files and folders: known by their names, held by a lock, swept when the process that made them is gone."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is swept there, and leftovers are passed over by their names alone
    fcntl = None  # type: ignore[assignment]

PREFIX = ".medseg-"


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is temporary: no reader takes it for a scan or a result."""
    return name.startswith(PREFIX)


@contextmanager
def temporary_file(folder: Path, ending: str) -> Iterator[Path]:
    """Give the path of a new file in a folder, with this ending; what is there at the end of the block is removed.

    Raises OSError where none can be made.
    """
    sweep(folder)
    with _held(lambda: _new_file(folder / f"{_prefix()}{secrets.token_hex(8)}{ending}")) as path:
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def temporary_folder(around: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give a new folder of this user's own, by default where the system keeps what is temporary; it is removed.

    Raises OSError where none can be made.
    """
    place = Path(around or tempfile.gettempdir())
    sweep(place)
    with _held(lambda: Path(tempfile.mkdtemp(prefix=_prefix(), dir=place))) as path:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes of this machine left in a folder; a process looks once at each."""
    _swept(Path(folder).absolute())


@cache
def _swept(folder: Path) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(_prefix())]:
            with suppress(OSError):
                _remove_if_left(entry)


def _remove_if_left(entry: os.DirEntry[str]) -> None:
    if fcntl is None or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
        return
    is_folder = entry.is_dir(follow_symlinks=False)
    handle = os.open(entry.path, os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDONLY if is_folder else os.O_RDWR))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: somebody is at work on it
        if is_folder:
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink()
    finally:
        os.close(handle)


@contextmanager
def _held(make: Callable[[], Path]) -> Iterator[Path]:
    """Give what is made, under a lock that ends with this process, however it ends."""
    path = make()
    if fcntl is None:
        yield path
        return
    handle = _locked(path)
    while handle is None:  # a process that sweeps came between the making and the lock
        path = make()
        handle = _locked(path)
    try:
        yield path
    finally:
        os.close(handle)


def _locked(path: Path) -> int | None:
    """Return an open and locked path, None where it is gone. On a disk without locks nothing is ever swept."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except FileNotFoundError:
        return None
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        there = os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        there = False
    if not there:
        os.close(handle)
    return handle if there else None


def _new_file(path: Path) -> Path:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return path


@cache
def _prefix() -> str:
    """Return how names begin of what this machine makes: locks of others may not be seen on a network disk."""
    return f"{PREFIX}{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"
