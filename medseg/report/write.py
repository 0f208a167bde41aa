"""What a label file says in numbers or in a picture, as the file that a name ends with."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from medseg.errors import OutputError, UsageError
from medseg.io import load
from medseg.io.dicom_series import choose, read_series
from medseg.io.files import check_place, reading
from medseg.io.regions import on_grid
from medseg.io.structures import load_labels
from medseg.labels import Label
from medseg.report.dicom_sr import save_dicom_sr
from medseg.report.measurements import Measurement, measure, save_measurements
from medseg.report.pictures import draw_overlay
from medseg.volume import Volume

ENDINGS = (".json", ".csv", ".png", ".dcm")


def write_report(
    image: str | PathLike[str],
    labels: str | PathLike[str],
    path: str | PathLike[str],
    *,
    table: str | PathLike[str] | None = None,
) -> list[Measurement]:
    """Write volume, place and intensity of every label as .json or .csv, as a DICOM SR (.dcm), or a picture (.png).

    Return what was measured. `labels` are a label file on the grid of the image, or a DICOM SEG or RT Structure Set of
    it. An SR refers to the slices of the image, which has to be the folder of a DICOM series then. `table` is a file
    with the names of labels, by default NAME.labels.json beside them. What is not found is measured as absent.
    Raises OutputError for another ending, UsageError for an SR of an image that is no series or where an input would be
    replaced, GeometryError for labels on another grid, and what reading and writing raise.
    """
    path, source = Path(path), Path(image)
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise OutputError(f"The name of a report ends in {', '.join(ENDINGS)}.", path=path, reason="format")
    check_place(path, [one for one in (image, labels, table) if one is not None])
    with reading(source):
        is_series = source.is_dir()
    if kind == ".dcm" and not is_series:
        raise UsageError("A DICOM SR refers to the slices of a series: give its folder as the image.")
    scan = read_series(choose(source, repaired=True)[0]) if is_series else load(source)
    found, names = load_labels(labels, source=source, table=table)
    found = on_grid(found, scan.grid)
    rows = _measured(found, names, scan)
    if kind == ".dcm":
        save_dicom_sr(rows, path, source=source, table=names)
    elif kind == ".png":
        draw_overlay(scan, found, names, path)
    else:
        save_measurements(rows, path)
    return rows


def _measured(labels: Volume, table: Sequence[Label], image: Volume) -> list[Measurement]:
    """Return the measurements of a label map, or of masks that may overlap, one for each label of the table."""
    if len(labels.array) == 1:
        return measure(labels, table, image)
    channels = zip(table, labels.array, strict=True)
    return [
        measure(labels.with_array(mask[None] * np.int32(label.value)), [label], image)[0] for label, mask in channels
    ]
