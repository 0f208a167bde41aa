"""Label maps made tidy: the largest piece kept, holes filled, what is too small removed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import UsageError
from medseg.volume import Volume, box_of

DENSE_LABELS = 2**16
"""Labels below this are looked for all at once, in a list that is as long as the largest."""

Box = tuple[slice, ...]


def keep_largest(labels: Volume, values: Sequence[int]) -> Volume:
    """Return labels (1, I, J, K) in which each of `values` keeps its largest piece; the rest of it becomes 0.

    Voxels that share a face belong together. Of pieces of one size the first in array order stays.
    """
    result = labels.array.copy()
    for value, box in _boxes(labels, values):
        pieces, count = ndimage.label(result[0][box] == value)
        if count > 1:
            largest = int(np.bincount(pieces.ravel())[1:].argmax()) + 1
            result[0][box][(pieces > 0) & (pieces != largest)] = 0
    return labels.with_array(result)


def keep_largest_piece(labels: NDArray[np.unsignedinteger], values: Sequence[int]) -> None:
    """Set to 0, in place, all of `values` in labels (I, J, K) but the largest piece that they form together.

    Voxels that share a corner belong together; of pieces of one size all stay (nnU-Net's rule).
    """
    inside = np.isin(labels, values)
    pieces, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    if count > 1:
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        labels[inside & (sizes != sizes.max())[pieces]] = 0


def fill_holes(labels: Volume, values: Sequence[int]) -> Volume:
    """Return labels (1, I, J, K) in which background enclosed by one of `values` belongs to it.

    Enclosed is what no path over faces connects with the border of the image. Other labels are left as they are.
    """
    result = labels.array.copy()
    for value, box in _boxes(labels, values):
        inside = result[0][box]
        filled = ndimage.binary_fill_holes(inside == value)
        inside[filled & (inside == 0)] = value
    return labels.with_array(result)


def drop_small(labels: Volume, values: Sequence[int], minimal_ml: float) -> Volume:
    """Return labels (1, I, J, K) without those of `values` that take less than `minimal_ml` in all.

    Raises UsageError for a volume that is not positive.
    """
    if not minimal_ml > 0:
        raise UsageError(f"The smallest volume to keep is a positive number of ml; here it is {minimal_ml}.")
    result = labels.array.copy()
    for value, box in _boxes(labels, values):
        inside = result[0][box]
        if np.count_nonzero(inside == value) * labels.grid.voxel_mm3 / 1000 < minimal_ml:
            inside[inside == value] = 0
    return labels.with_array(result)


def _boxes(labels: Volume, values: Sequence[int]) -> list[tuple[int, Box]]:
    """Return the values that are there, each with the part of the array that holds it: far smaller than the image."""
    array = labels.array[0]
    found: list[tuple[int, Box | None]]
    if array.max() < DENSE_LABELS:
        where = ndimage.find_objects(array.astype(np.int32, copy=False))
        found = [(value, where[value - 1]) for value in values if 0 < value <= len(where)]
    else:
        found = [(value, box_of(array == value)) for value in values if value > 0]
    return [(value, box) for value, box in found if box is not None]
