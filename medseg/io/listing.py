"""The files below a folder: through links to folders, too, each folder once, and none forgotten without a word."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from medseg.io.dicom_lost import may_hold_slices
from medseg.io.leftovers import is_leftover

Fail = Callable[[OSError], None]
"""What is told of a folder or a file that the system does not let look at; its path is the `filename` of the error."""


def slice_files(folder: Path, fail: Fail) -> list[Path]:
    """Return the files at or below a folder that may hold slices, sorted.

    Links to folders are followed, except those that lead back to a folder which holds the link, and those to what is
    listed already. Of the files of a folder that may not be looked at the first is told to `fail`.
    """
    found = []
    failed: set[Path] = set()
    for file in _files(folder, fail):
        try:
            if may_hold_slices(file):
                found.append(file)
        except OSError as error:  # a disk that is gone, a path that is too long
            if file.parent not in failed:
                failed.add(file.parent)
                fail(_at(error, str(file)))
    return sorted(found)


def _files(start: Path, fail: Fail) -> Iterator[Path]:
    """Yield what is no folder. Folders come before links, so that a link to one of them changes no path.

    Folders are told apart by their real paths: numbers of inodes are not unique on every network disk.
    """
    root = os.path.realpath(start)
    seen: set[str] = set()
    links = [(str(start), root)]
    while links:
        place, home = links.pop(0)
        real = os.path.realpath(place)
        if place != str(start) and (_holds(real, home) or _holds(real, root)):
            continue
        folders = [(place, real)]
        while folders:
            place, real = folders.pop()
            if real in seen:
                continue
            seen.add(real)
            for entry in _entries(place, fail):
                if _is_folder(entry, follow=False):
                    folders.append((entry.path, str(Path(real, entry.name))))
                elif _is_folder(entry, follow=True):
                    links.append((entry.path, real))
                else:
                    yield Path(entry.path)


def _entries(folder: str, fail: Fail) -> list[os.DirEntry[str]]:
    try:
        os.stat(f"{folder}/.")  # noqa: PTH116 - pathlib drops the dot, and a folder may be listed and not entered
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_leftover(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        fail(_at(error, folder))
        return []


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        return False  # whoever looks at it as a file meets the same error


def _holds(folder: str, other: str) -> bool:
    """Return whether a folder is the other one, or lies above it."""
    return Path(other).is_relative_to(folder)


def _at(error: OSError, path: str) -> OSError:
    error.filename = path
    return error
