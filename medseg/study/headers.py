"""The heads of many files, read ahead by threads and, where there are thousands, parsed by several processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medseg.cores import cores
from medseg.errors import MedsegError, unexpected
from medseg.io.dicom_slice import Slice, read_headers, read_study_uid
from medseg.study.processes import end_with, python_command, python_environment

READERS = 16
"""Threads that fetch the heads of files ahead of the parser: it waits for no disk and no network."""

HEAD_BYTES = 1 << 16
"""What they fetch; headers of single slices are shorter."""

MANY = 3000
"""So many files take a process longer to read than other processes take to start."""


def all_headers(files: Sequence[Path]) -> Iterator[tuple[Path, list[Slice] | MedsegError]]:
    """Yield each file with what `read_headers` returns or raises for it."""
    yield from _each("headers", files)


def all_study_uids(files: Sequence[Path]) -> Iterator[tuple[Path, str | MedsegError | None]]:
    """Yield each file with what `read_study_uid` returns or raises for it."""
    yield from _each("uids", files)


def _each(kind: str, files: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    count = min(cores(), len(files) // (MANY // 2))
    if len(files) < MANY or count < 2:
        yield from _read(kind, files)
        return
    size = -(-len(files) // count)
    shares = [files[start : start + size] for start in range(0, len(files), size)]
    with ThreadPoolExecutor(count) as pool:
        for share in pool.map(lambda share: _elsewhere(kind, share), shares):
            yield from share


def _elsewhere(kind: str, files: Sequence[Path]) -> list[tuple[Path, Any]]:
    """Return what another process read; if that fails, what this one reads."""
    done = subprocess.run(  # noqa: S603 - this module, for paths that arrive by its input
        python_command("medseg.study.headers", kind),
        input=pickle.dumps([*files]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=python_environment(), check=False,
    )  # fmt: skip
    if done.returncode:
        return [*_read(kind, files)]
    found: list[tuple[Path, Any]] = pickle.loads(done.stdout)  # noqa: S301 - from the process just started
    return found


def _read(kind: str, files: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    read = {"headers": read_headers, "uids": read_study_uid}[kind]
    with ThreadPoolExecutor(READERS) as pool:
        for file in pool.map(_fetch, files):
            try:
                yield file, read(file)
            except MedsegError as error:
                yield file, error
            except Exception as error:  # noqa: BLE001 - memory, most likely: one file never stops the rest
                told = unexpected(error)
                told.path = file
                yield file, told


def _fetch(file: Path) -> Path:
    try:
        with file.open("rb") as opened:
            opened.read(HEAD_BYTES)
    except OSError:
        pass  # the parser meets the same error, and reports it
    return file


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.stdout.buffer.write(pickle.dumps([*_read(sys.argv[2], pickle.load(sys.stdin.buffer))]))  # noqa: S301 - from whoever started this
