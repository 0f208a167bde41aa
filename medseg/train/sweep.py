"""Prepared cases that no training of a model needs any more, swept out of its cache folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

LOCK = "in_use"
"""A file that trainings hold a shared lock on for as long as they read prepared cases."""

PREPARED = re.compile(r"([0-9a-f]{24})\..+")
"""What prepared cases are called, of whatever version: a hash, and which part of the case it is."""


@contextmanager
def swept_and_kept(folder: Path, needed: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Sweep a cache folder where no training reads from it, then keep others from sweeping it inside the block.

    `needed` gives the hashes of prepared cases that stay; nothing else than prepared cases is ever removed. Where the
    system has no such lock, nothing is swept; a lock of a process that was killed is gone with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # Windows; some network disks
            import fcntl

            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, handle)
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _sweep(folder, needed)
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def _sweep(folder: Path, needed: Callable[[], Iterable[str]]) -> None:
    found = [(match[1], file) for file in folder.iterdir() if (match := PREPARED.fullmatch(file.name))]
    if not found:
        return
    try:
        stay = set(needed())
    except OSError:
        return  # a case that cannot be read now: which of them it needs is not known
    for stem, file in found:
        if stem not in stay:
            with suppress(OSError):
                file.unlink()
