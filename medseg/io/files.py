"""What every file format needs: outputs that are whole or not there, errors that know their path, grids for voxels."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from medseg.errors import GeometryError, MedsegError, OutputError, UnknownOrientation, UnreadableFile, UsageError
from medseg.io.leftovers import sweep, temporary_file
from medseg.volume import Affine, Grid

DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
"""Where an axis with this letter points in RAS+ world space."""


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it becomes `path`, else it is removed.

    It has the ending of `path`, in lower case. The file is flushed to the disk before it is renamed, so that no crash
    leaves part of it under the final name.
    Raises OutputError where the folder is missing or cannot be written.
    """
    final = Path(path)
    ending = "".join(final.suffixes[-2:]).lower()  # since ITK writes two files under other names for .MHA
    try:
        with temporary_file(final.parent, ending) as beside:
            yield beside
            # Not "rb": Windows flushes only what is open for writing.
            with beside.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(beside, final)
    except OSError as error:
        raise OutputError(
            f"The file could not be written: {error.strerror or 'the system gives no cause'}. "
            "Check that its folder exists, may be written to and has space left.",
            path=final,
        ) from error


def check_place(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Check before the work what `written_whole` would find after it, and that the file is not one of the inputs.

    Raises UsageError where it would replace an input, under whatever name, and OutputError where it is a folder, or its
    folder is missing or may not be written to. What killed processes left in the folder is swept.
    """
    path, cause = Path(path), ""
    try:
        if any(_same(path, one) for one in inputs):
            raise UsageError("The output would replace an input: give it another name or folder.", path=path)
        if path.is_dir():
            cause = "a folder has that name"
        elif not path.parent.is_dir():
            cause = "its folder does not exist"
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            cause = "its folder may not be written to"
    except OSError as error:
        cause = error.strerror or "the system gives no cause"
    if cause:
        raise OutputError(f"The file cannot be written: {cause}. Give another name, or mend that.", path=path)
    sweep(path.parent)


def _same(path: Path, other: str | os.PathLike[str]) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in every medseg error that leaves the block; what the system or zlib raise becomes UnreadableFile.

    Overflow and NaN in what a damaged header says make no warnings: the results are checked.
    """
    try:
        with np.errstate(all="ignore"):
            yield
    except MedsegError as error:
        error.path = error.path or Path(path)
        raise
    except FileNotFoundError as error:
        text = "There is no such file or folder."
        if leads_nowhere(Path(path)):
            text = "The link leads to a file that is not there. Fetch that file, or copy it again."
        elif os.path.lexists(path):
            text = "A file that belongs to this one, such as the one that holds its voxels, does not exist."
        raise UnreadableFile(text, path=path, reason="missing") from error
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or "it is cut short, damaged, or not what its name says"
        raise UnreadableFile(f"The file could not be read: {cause}. Copy or export it again.", path=path) from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError where a path leads to a pipe or a device, which might never end, or to a folder."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def leads_nowhere(path: Path) -> bool:
    """Return whether a path is a link to what is not there, as of a file that was not fetched."""
    return path.is_symlink() and not path.exists()


def placed_grid(shape: Sequence[int], affine: Affine) -> Grid:
    """Return the grid that a file states; raises UnknownOrientation where its affine is no place."""
    try:
        return Grid((shape[0], shape[1], shape[2]), affine)
    except GeometryError as error:
        raise UnknownOrientation(
            "The position of the voxels in this file is damaged: its matrix is not finite and invertible. "
            "Export the file again, or repair its header.",
            reason="bad_affine",
        ) from error


def assumed_grid(shape: Sequence[int], spacing_mm: ArrayLike, orientation: str | None) -> Grid:
    """Return the grid of a file that states a spacing alone: its axes point as `orientation`, its center is at 0 0 0.

    Raises UnknownOrientation where `orientation` is None or the spacing is not positive, UsageError where
    `orientation` does not name three different directions.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if orientation is None:
        raise UnknownOrientation(
            "The file does not say where its voxels lie in the patient. If you know where its three axes point, "
            "give them as the assumed orientation (assume_orientation, --assume-orientation), for example RAS or LPS."
        )
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise UnknownOrientation("The file gives no positive spacing. Repair its header.", reason="bad_spacing")
    try:
        affine = np.eye(4)
        affine[:3, :3] = np.array([DIRECTIONS[letter] for letter in orientation.upper()]).T * spacing
        affine[:3, 3] = -affine[:3, :3] @ (np.asarray(shape) - 1) / 2
        return Grid((shape[0], shape[1], shape[2]), affine)
    except (KeyError, ValueError, GeometryError) as error:
        raise UsageError(
            f"An orientation is one letter of each pair L/R, P/A, I/S, such as RAS; here it is {orientation!r}."
        ) from error
