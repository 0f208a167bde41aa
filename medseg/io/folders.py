"""What a folder stands for, by one rule for every verb, and which volumes in it are label maps and no scans.

A folder that holds slices or frames of a scan in DICOM, in whatever folder below it, is DICOM. Volumes beside are then
passed over. Any other folder is a folder of volumes, which are those in it and not those in folders below.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from medseg.errors import MedsegError, UnreadableFile
from medseg.io import load, read_grid
from medseg.io.dicom_series import files_below
from medseg.io.dicom_slice import read_headers
from medseg.io.label_table import read_table
from medseg.io.structures import beside, stem
from medseg.volume import Array, Grid

MOST_LABELS, FEW_LABELS = 256, 32
"""Values that a label map has at most, and so few that no scan has them."""

LEAST_ALIKE = 0.5
"""Of two neighbors of which one is labelled, so many share their value in a label map; in a scan far fewer do."""


def holds_slices(folder: Path) -> bool:
    """Return whether slices or frames of a scan in DICOM lie at or below a folder; objects of labels are none.

    Raises UnreadableFile for a folder that cannot be read.
    """
    for file in files_below(folder):
        try:
            parts = read_headers(file)
        except UnreadableFile:
            return True  # DICOM that is damaged
        if any(part.problem is None or part.problem.reason != "not_an_image" for part in parts):
            return True
    return False


def label_maps(files: Sequence[Path]) -> dict[Path, str]:
    """Return those of the volumes of a folder that are no scans but label maps or made with them, and how one knows.

    That is a volume whose values are all in the label table beside it (NAME.labels.json); what `segment` writes with it
    (NAME_uncertainty, NAME_probability_VALUE); and one of whole numbers that make up patches, on the grid of another
    volume that is none. What cannot be read counts as a scan: reading it will say why.
    """
    grids = {file: grid for file in files if (grid := _grid(file)) is not None}
    tabled, patches = set(), set()
    for file, grid in grids.items():
        alike = any(other is not file and grids[other].matches(grid) for other in grids)
        voxels = _voxels(file) if alike or beside(file).is_file() else None
        if voxels is not None and has_table(file, voxels):
            tabled.add(file)
        elif voxels is not None and alike and is_patches(voxels):
            patches.add(file)
    scans = [grids[file] for file in grids.keys() - tabled - patches]
    patches = {file for file in patches if any(scan.matches(grids[file]) for scan in scans)}
    found = dict.fromkeys(patches, "it holds patches of whole numbers, on the grid of a scan in this folder")
    found |= dict.fromkeys((file for file in files if _made_with(file, tabled)), "it was written with a label map")
    return found | dict.fromkeys(tabled, "the label table beside it names its values")


def has_table(file: Path, voxels: Array) -> bool:
    """Return whether the label table beside a volume says what each of its values means: then it is a label map."""
    table = beside(file)
    if not table.is_file():
        return False
    try:
        known = {0, *(label.value for label in read_table(table))}
    except MedsegError:
        return False
    return all(set(np.unique(plane).tolist()) <= known for plane in _planes(voxels))


def is_patches(voxels: Array) -> bool:
    """Return whether voxels are whole numbers from 0, few of them, in patches: what a label map is and no scan."""
    values: set[float] = set()
    same = pairs = 0
    for plane in _planes(voxels):
        values |= set(np.unique(plane).tolist())
        if len(values) > MOST_LABELS:
            return False
        labelled = (plane[1:] != 0) | (plane[:-1] != 0)
        pairs += int(labelled.sum())
        same += int((labelled & (plane[1:] == plane[:-1])).sum())
    if len(values) < 2 or any(value < 0 or value != int(value) for value in values if math.isfinite(value)):
        return False
    return all(map(math.isfinite, values)) and (len(values) <= FEW_LABELS or same >= LEAST_ALIKE * pairs)


def _planes(voxels: Array) -> Iterator[Array]:
    """Yield planes of voxels (C, I, J, K), each (I, J)."""
    return (plane for channel in voxels for plane in np.moveaxis(channel, 2, 0))


def _made_with(file: Path, label_maps: Collection[Path]) -> bool:
    ends = r"_(uncertainty|probability_\d+)"
    return any(
        file.parent == one.parent and re.fullmatch(re.escape(stem(one)) + ends, stem(file)) for one in label_maps
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Look without a word: what is odd about a scan is said when it is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _grid(file: Path) -> Grid | None:
    try:
        with _quietly():
            return read_grid(file)
    except MedsegError:
        return None


def _voxels(file: Path) -> Array | None:
    try:
        with _quietly():
            return load(file).array
    except MedsegError:
        return None
