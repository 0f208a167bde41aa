"""Labels as DICOM objects hold them: frame by frame on the slices of a series, and put together again from there.

One channel is a label map. Several channels are masks, one for each label of the table in its order, and may overlap.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError, InputError, UsageError
from medseg.io.dicom_geometry import POSITION_TOLERANCE_MM
from medseg.labels import Label, complete, label_map
from medseg.volume import Grid, Volume

Heights = NDArray[np.float64]
"""The k of each slice of a series in its grid, as `Series.heights` says."""

Wanted = Callable[[str], bool]
"""Whether a structure of this name is to be read."""

Part = tuple[Label, NDArray[np.integer[Any]]]
"""A label, and where it is: flat indices into (slices, rows, columns)."""

Found = defaultdict[str, Counter[int]]
"""What was met while an object was read: by its kind, how often it was met in each label (0: in none)."""


@dataclass(frozen=True, eq=False)
class Regions:
    """The labels that occur somewhere, and where.

    `frames` are numbers (slices, rows, columns), n for the n-th label counted from 1; or, where regions overlap, masks
    (slices, rows, columns, labels).
    """

    labels: tuple[Label, ...]
    frames: NDArray[Any]


def labels_met(counts: Counter[int]) -> str:
    """Return the labels in which something was met, for people: "label 2" or "labels 2, 5", "" for none."""
    labels = sorted(label for label, count in counts.items() if label and count)
    return f"label{'s' * (len(labels) > 1)} {', '.join(map(str, labels))}" if labels else ""


def on_grid(labels: Volume, grid: Grid) -> Volume:
    """Return the labels on `grid`, which has the same voxels, in any order of axes; lossless.

    Raises GeometryError (`source_grid`) where the voxels are not the same, to 0.02 mm.
    """
    for candidate in (labels, labels.reoriented(grid.orientation)):
        if candidate.grid.matches(grid, POSITION_TOLERANCE_MM):
            return Volume(candidate.array, grid)
    raise GeometryError(
        f"The labels, {labels.grid.shape} voxels, lie on another grid than their source, {grid.shape} voxels. "
        "Resample them onto the grid of the source first.",
        reason="source_grid",
    )


def regions_of(labels: Volume, table: Sequence[Label], heights: Heights | None = None) -> Regions:
    """Return what is found of a label map or, from several channels, of one mask for each label of the table.

    `heights` are the k of the slices, which take the labels nearest to them; without, each k is a slice. Values that
    the table does not know are called "label N". Raises InputError (`not_labels`) for voxels that are no labels,
    UsageError for a table that does not fit the channels.
    """
    if heights is not None and not _even(heights, labels.grid):
        nearest = labels.array[..., np.rint(heights).astype(np.intp)]
        labels = Volume(nearest, Grid((*labels.grid.shape[:2], len(heights)), labels.grid.affine))
    if len(labels.array) == 1:
        return _numbered(label_map(labels).transpose(2, 1, 0), table)
    names = tuple(table) or complete((), range(1, len(labels.array) + 1))
    if len(names) != len(labels.array):
        raise UsageError(f"{len(labels.array)} masks need a table of as many labels; the one here has {len(names)}.")
    masks = [_mask(labels.with_array(channel[None])) for channel in labels.array]
    found = [place for place, mask in enumerate(masks) if mask.any()]
    if not found:
        return Regions((), np.zeros(masks[0].shape, np.uint8))
    stacked = np.stack([masks[place] for place in found], axis=-1)
    if stacked.sum(axis=-1, dtype=np.uint16).max() == 1:
        numbers = np.arange(1, len(found) + 1, dtype=_dtype(len(found)))
        stacked = np.stack([(frame * numbers).sum(axis=-1, dtype=numbers.dtype) for frame in stacked])
    return Regions(tuple(names[place] for place in found), stacked)


def volume_of(parts: Sequence[Part], grid: Grid, heights: Heights | None = None) -> Volume:
    """Return the labels at the given places, which are flat indices into (slices, rows, columns), each at most once.

    A label map where no two labels meet, else one mask for each label. `heights` are the k of the slices in `grid`,
    each k of which takes the slice nearest to it; without, each k is a slice.
    """
    i, j, k = grid.shape
    uneven = heights is not None and not _even(heights, grid)
    if heights is not None and uneven:
        k = len(heights)
    highest = max((label.value for label, _ in parts), default=0)
    values = np.zeros(i * j * k, _dtype(highest))
    for label, places in parts:
        values[places] = label.value
    arrays = [values]
    if np.count_nonzero(values) < sum(len(places) for _, places in parts):
        arrays = [np.zeros(i * j * k, np.uint8) for _ in parts]
        for mask, (_, places) in zip(arrays, parts, strict=True):
            mask[places] = 1
    frames = [array.reshape(k, j, i) for array in arrays]
    if heights is not None and uneven:
        nearest = np.abs(np.arange(grid.shape[2])[:, None] - heights).argmin(axis=1)
        frames = [frame[nearest] for frame in frames]
    return Volume(np.stack([frame.transpose(2, 1, 0) for frame in frames]), grid)


def slice_numbers(k: NDArray[np.float64], heights: Heights) -> NDArray[np.float64]:
    """Return the numbers of slices at these k as fractions, where `heights` are the k of all slices in order.

    Beyond the ends it goes on in the steps of the ends.
    """
    if len(heights) < 2:
        return k
    numbers = np.interp(k, heights, np.arange(len(heights)))
    numbers += np.minimum(0, k - heights[0]) / (heights[1] - heights[0])
    return np.asarray(numbers + np.maximum(0, k - heights[-1]) / (heights[-1] - heights[-2]))


def _even(heights: Heights, grid: Grid) -> bool:
    return len(heights) == grid.shape[2] and bool((heights == np.arange(len(heights))).all())


def _numbered(frames: NDArray[np.integer[Any]], table: Sequence[Label]) -> Regions:
    values = sorted(set().union(*(np.unique(frame).tolist() for frame in frames)) - {0})
    numbers = np.empty(frames.shape, _dtype(len(values)))
    for frame, into in zip(frames, numbers, strict=True):
        into[...] = np.searchsorted([0, *values], frame)
    return Regions(tuple(label for label in complete(table, values) if label.value in set(values)), numbers)


def _mask(channel: Volume) -> NDArray[np.bool_]:
    values = label_map(channel)
    if values.max() > 1:
        raise InputError(
            "Of several channels each is the mask of one label, 0 and 1; one here has other values.",
            reason="not_labels",
        )
    return values.transpose(2, 1, 0).astype(bool)


def _dtype(highest: int) -> np.dtype[Any]:
    return np.min_scalar_type(highest)
