"""What a label map says in numbers: the volume and place of every structure, and how bright it is in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError, InputError
from medseg.labels import Label
from medseg.volume import Volume

DENSE_LABELS = 2**16
"""Labels below this are counted without being sorted first."""


@dataclass(frozen=True)
class Measurement:
    """One structure: its volume, its center in RAS+ mm and, with an image, mean and deviation in the image's units.

    `expected_volume_ml` sums the probabilities that a model gave it, so that a voxel counts by its share.

    What cannot be said of a structure that is not there, or without an image, is None.
    """

    value: int
    name: str
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float] | None
    intensity_mean: float | None = None
    intensity_std: float | None = None
    expected_volume_ml: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON takes it."""
        return asdict(self)


def measure(labels: Volume, table: Sequence[Label], image: Volume | None = None) -> list[Measurement]:
    """Return one measurement for every label of the table and every other value in the volume, sorted by value.

    A label that is not found has no voxels; a value that the table does not know is called "label N". With an image on
    the same grid the intensities of its first channel are measured too.
    Raises InputError where the volume is no label map, GeometryError where the image lies on another grid.
    """
    if image is not None and not image.grid.matches(labels.grid):
        raise GeometryError("The image and the labels lie on different grids; resample one onto the other first.")
    sums = _sums(label_map(labels), None if image is None else image.array[0])
    names = {value: f"label {value}" for value in sums} | {label.value: label.name for label in table}
    return [_measurement(value, names[value], sums.get(value), labels, image is not None) for value in sorted(names)]


def label_map(labels: Volume) -> NDArray[np.integer[Any]]:
    """Return the label values (I, J, K) of a volume as integers, without a copy where they are stored so.

    Raises InputError (`not_labels`) for several channels, fractions and negative numbers.
    """
    values: NDArray[Any] = labels.array[0]
    whole: NDArray[np.integer[Any]] = values
    if values.dtype.kind in "fb":
        with np.errstate(invalid="ignore"):  # what is not finite turns into something else, and is found so
            whole = values.astype(np.int32)
    if len(labels.array) > 1 or (whole is not values and not np.array_equal(whole, values)) or whole.min() < 0:
        raise InputError(
            "A label map is one channel of whole numbers from 0; this volume holds something else, maybe an image.",
            reason="not_labels",
        )
    return whole


def _sums(values: NDArray[np.integer[Any]], image: NDArray[Any] | None) -> dict[int, NDArray[np.float64]]:
    """Return for each label the number of its voxels and the sums over them of i, j, k, intensity and its square."""
    distinct, numbers = _numbered(values)
    sums = np.zeros((6, len(distinct)))
    # Slabs as they lie in memory, whatever the order of the axes.
    order = sorted(range(3), key=lambda axis: -numbers.strides[axis])
    shades = None if image is None else image.transpose(order)
    for row, slab in enumerate(numbers.transpose(order)):
        p, q = np.nonzero(slab)
        found = slab[p, q]
        terms: list[NDArray[Any] | None] = [None, p, q]
        if shades is not None:
            shade = shades[row][p, q].astype(np.float64)
            terms += [shade, shade**2]
        count, *others = (np.bincount(found, weights=term, minlength=len(distinct)) for term in terms)
        places = [0, *(axis + 1 for axis in order), 4, 5]
        for place, total in zip(places, [count, row * count, *others], strict=False):
            sums[place] += total
    return {int(distinct[number]): sums[:, number] for number in np.flatnonzero(sums[0])}


def _numbered(values: NDArray[np.integer[Any]]) -> tuple[NDArray[Any], NDArray[np.integer[Any]]]:
    """Return labels, and the voxels as numbers of them of which 0 is background."""
    largest = int(values.max())
    if largest < DENSE_LABELS:
        return np.arange(largest + 1), values
    distinct, numbers = np.unique(np.append(values.ravel(), values.dtype.type(0)), return_inverse=True)
    return distinct, numbers[:-1].reshape(values.shape)


def _measurement(
    value: int, name: str, sums: NDArray[np.float64] | None, labels: Volume, with_image: bool
) -> Measurement:
    if sums is None:
        return Measurement(value, name, 0, 0.0, None)
    voxels = int(sums[0])
    volume_ml = voxels * labels.grid.voxel_mm3 / 1000
    x, y, z = labels.grid.to_world(sums[1:4] / voxels).tolist()
    if not with_image:
        return Measurement(value, name, voxels, volume_ml, (x, y, z))
    mean, mean_square = (sums[4:] / voxels).tolist()
    std = max(0.0, mean_square - mean**2) ** 0.5
    return Measurement(value, name, voxels, volume_ml, (x, y, z), mean, std)
