"""What a label map says in numbers: the volume and place of every structure, and how bright it is in the image."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError, OutputError
from medseg.io.files import written_whole
from medseg.labels import Label, complete, label_map
from medseg.volume import Volume

DENSE_LABELS = 2**16
"""Labels below this are counted without being sorted first."""


@dataclass(frozen=True)
class Measurement:
    """One structure: its volume, its center in RAS+ mm and, with an image, how bright it is in the image's units.

    `expected_volume_ml` sums the probabilities that a model gave it, so that a voxel counts by its share.

    What cannot be said of a structure that is not there, without an image, or where that has voxels which are NaN or
    infinite, is None.
    """

    value: int
    name: str
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float] | None
    intensity_mean: float | None = None
    intensity_std: float | None = None
    intensity_min: float | None = None
    intensity_max: float | None = None
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
    return [
        _measurement(label.value, label.name, sums.get(label.value), labels, image is not None)
        for label in complete(table, sums)
    ]


def save_measurements(measurements: Sequence[Measurement], path: str | PathLike[str]) -> None:
    """Write measurements as .json or .csv; in the latter the center has three columns, and what is not known is blank.

    Raises OutputError for another ending and where the file cannot be written.
    """
    path = Path(path)
    rows = [row.to_dict() for row in measurements]
    if path.suffix.lower() not in {".json", ".csv"}:
        raise OutputError("The name of a file of measurements ends in .json or .csv.", path=path, reason="format")
    with written_whole(path) as beside:
        if path.suffix.lower() == ".json":
            beside.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            return
        with beside.open("w", encoding="utf-8", newline="") as file:
            names = [field.name for field in fields(Measurement)]
            place = names.index("centroid_mm")
            table = csv.writer(file)
            table.writerow([*names[:place], "x_mm", "y_mm", "z_mm", *names[place + 1 :]])
            for row in rows:
                center = row["centroid_mm"] or (None, None, None)
                values = [row[name] for name in names]
                table.writerow([*values[:place], *center, *values[place + 1 :]])


def _sums(values: NDArray[np.integer[Any]], image: NDArray[Any] | None) -> dict[int, NDArray[np.float64]]:
    """Return for each label the number of its voxels, the sums of i, j, k, intensity and its square, and the range."""
    distinct, numbers = _numbered(values)
    sums = np.zeros((8, len(distinct)))
    sums[6:] = np.array([[np.inf], [-np.inf]])
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
            with np.errstate(invalid="ignore"):  # where there is a NaN
                np.minimum.at(sums[6], found, shade)
                np.maximum.at(sums[7], found, shade)
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
    if not with_image or not np.isfinite(sums[4]):
        return Measurement(value, name, voxels, volume_ml, (x, y, z))
    mean, mean_square = (sums[4:6] / voxels).tolist()
    std = max(0.0, mean_square - mean**2) ** 0.5
    return Measurement(value, name, voxels, volume_ml, (x, y, z), mean, std, *sums[6:].tolist())
