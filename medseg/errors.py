"""Every error that medseg raises on purpose.

    MedsegError                 anything below; `path` and `reason` as attributes
    ├── InputError              an input that cannot be used as it is
    │   ├── UnreadableFile      missing, truncated, or not the format that its name says
    │   ├── NotAVolume          readable, but no 3-D scalar image (complex, RGB, a time series ...)
    │   ├── UnknownOrientation  the file does not say where its voxels lie in the patient
    │   └── SeriesRefused       a DICOM series that cannot be read right; `reason` says why
    ├── GeometryError           grids that do not match, overlap, or make sense
    ├── DatasetError            a training dataset with problems, all of them listed
    ├── ModelError              a model folder, plan or weights that cannot be used
    ├── OutputError             an output that cannot be written
    ├── ClusterError            a cluster that cannot be reached, or is gone
    └── UsageError              an argument that makes no sense

The text says what was expected, what came and what to do. It never names a file, since a file name can name a
patient: the path is an attribute, and whoever shows the error decides whether to show it.
"""

from __future__ import annotations

import traceback
from os import PathLike
from pathlib import Path


class MedsegError(Exception):
    """A failure with a text for people, a `reason` code for machines and, where one is concerned, a `path`."""

    default_reason = "error"

    def __init__(self, message: str, *, path: str | PathLike[str] | None = None, reason: str | None = None):
        super().__init__(message)
        self.path = None if path is None else Path(path)
        self.reason = reason or self.default_reason


class InputError(MedsegError):
    """An input cannot be used as it is."""

    default_reason = "bad_input"


class UnreadableFile(InputError):
    """A file is missing, truncated, or not of the format that its name promises."""

    default_reason = "unreadable"


class NotAVolume(InputError):
    """A file holds something other than one 3-D scalar image."""

    default_reason = "not_a_volume"


class UnknownOrientation(InputError):
    """A file does not say where its voxels lie in the patient."""

    default_reason = "unknown_orientation"


class SeriesRefused(InputError):
    """A DICOM series cannot be read right; `reason` is a code such as `missing_slice`."""

    default_reason = "series_refused"


class GeometryError(MedsegError):
    """Grids do not match, do not overlap, or make no sense."""

    default_reason = "geometry"


class DatasetError(MedsegError):
    """A training dataset has problems; the text lists all of them."""

    default_reason = "dataset"


class ModelError(MedsegError):
    """A model folder, its plan or its weights cannot be used."""

    default_reason = "model"


class OutputError(MedsegError):
    """An output cannot be written."""

    default_reason = "output"


class ClusterError(MedsegError):
    """A cluster cannot be reached, or is gone."""

    default_reason = "cluster"


class UsageError(MedsegError):
    """An argument makes no sense."""

    default_reason = "usage"


def unexpected(error: BaseException) -> MedsegError:
    """Return what stands for an error that medseg did not raise, without a word that a file or a third party chose."""
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        return MedsegError("The memory did not suffice.", reason="out_of_memory")
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return MedsegError(f"Unexpected {type(error).__name__} at {where}.", reason="internal")
