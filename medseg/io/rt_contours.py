"""Contours of an RT Structure Set on the slices of a series: in which plane each lies, and which voxels it encloses.

Heights are numbers of slices as fractions, so that 1 is the step between two slices wherever they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.io.contours import Polygon, distinct, fill
from medseg.io.dicom_geometry import LPS_TO_RAS
from medseg.io.dicom_header import LARGEST_NUMBER
from medseg.io.dicom_references import whole
from medseg.io.regions import Found, Heights, slice_numbers
from medseg.volume import Grid

if TYPE_CHECKING:
    from pydicom import Dataset

CLOSED = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})

BETWEEN_SLICES = 0.101
"""A contour that lies farther from a slice than this share of a step is taken to the nearest one with a warning.

A tenth, and what the decimals of a file add to it.
"""

HALFWAY = 0.05
"""From this much below the middle between two slices contours go to the upper one, so that rounding decides nothing."""

SAME_HEIGHT = 0.02
"""Contours closer than this are in one plane even where they name different images."""

LEFT_OUT = {
    "unreadable": "have coordinates that are missing or are not numbers in threes",
    "open": "are open lines, points, or of a type that is missing or unknown",
    "askew": "are not parallel to the slices",
    "outside": "lie outside the source",
}
"""Why a contour encloses no voxel of the source."""

Image = tuple[str, int]
"""The SOPInstanceUID of what a contour was drawn on and the number of its frame; "" and 0 where it does not say."""


@dataclass(frozen=True)
class Slices:
    """Where contours go: the slices of a series at these k of its grid.

    `numbers` finds them by what names them; without, no contour is asked whether it lies on the slice that it names.
    """

    grid: Grid
    heights: Heights
    numbers: Mapping[Image, int] = field(default_factory=dict)

    def index(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (i, j, number of the slice) of points in LPS mm."""
        index = self.grid.to_index(points @ LPS_TO_RAS[:3, :3])
        index[:, 2] = slice_numbers(index[:, 2], self.heights)
        return index


@dataclass
class _Drawn:
    """A closed contour, its line in voxels of a slice, and its height."""

    contour: Dataset
    line: Polygon
    height: float

    @cached_property
    def image(self) -> Image:
        """Return the image that the contour names; few are asked, and to find out takes as long as to fill it."""
        return image_of(self.contour)


def covered(contours: Sequence[Dataset], slices: Slices, value: int, found: Found) -> NDArray[np.intp]:
    """Return the flat indices into (slices, rows, columns) inside the contours of one structure.

    `found` counts for the label `value` the contours that were "used", went to the nearest slice ("between"), were
    left out (LEFT_OUT), and beside that those that reach beyond the slices ("cut"), have another number of points than
    they state ("miscounted"), or lie on another slice than the one that they name ("elsewhere").
    """
    drawn = [one for contour in contours if (one := _drawn(contour, slices, value, found))]
    on_slice: dict[int, list[list[_Drawn]]] = {}
    for plane in _planes(drawn):
        k = _nearest(_height(plane))
        if not 0 <= k < len(slices.heights):
            found["outside"][value] += len(plane)
            continue
        found["between" if _off(plane, k) else "used"][value] += len(plane)
        if slices.numbers:
            found["elsewhere"][value] += sum(slices.numbers.get(one.image, k) != k for one in plane)
        on_slice.setdefault(k, []).append(plane)
    inside = [_inside(plane, k, slices.grid) for k, planes in on_slice.items() for plane in _joined(planes, k)]
    return np.unique(np.concatenate(inside)) if inside else np.zeros(0, np.intp)


def _nearest(height: float) -> int:
    """Return the number of the slice that a contour goes to; from halfway up, to HALFWAY.

    Half to even would leave every other slice empty, and rounding would do the same at random.
    """
    return int(np.floor(height + 0.5 + HALFWAY))


def image_of(contour: Dataset) -> Image:
    """Return which image a contour says it was drawn on."""
    for image in contour.get("ContourImageSequence") or ():
        return str(image.get("ReferencedSOPInstanceUID") or ""), whole(image, "ReferencedFrameNumber") or 0
    return "", 0


def _drawn(contour: Dataset, slices: Slices, value: int, found: Found) -> _Drawn | None:
    points = _points(contour)
    if points is None:
        found["unreadable"][value] += 1
        return None
    index = slices.index(points)
    kind = _kind(contour, index, slices.grid)
    if kind:
        found[kind][value] += 1
        return None
    low, high = index[:, :2].min(axis=0), index[:, :2].max(axis=0)
    found["cut"][value] += bool((low < -1).any() or (high > slices.grid.shape[:2]).any())
    found["miscounted"][value] += whole(contour, "NumberOfContourPoints") not in {None, len(points)}
    return _Drawn(contour, index[:, :2], float(index[:, 2].mean()))


def _points(contour: Dataset) -> NDArray[np.float64] | None:
    """Return the points (n, 3) of a contour in LPS mm; None where they are no numbers in threes."""
    raw = contour.get_item("ContourData")
    text = getattr(raw, "value", None)
    try:
        numbers = text.rstrip(b" \0").split(b"\\") if isinstance(text, bytes) else contour.get("ContourData")
        points = np.array(numbers, dtype=np.float64).reshape(-1, 3)
    except (ValueError, TypeError):
        return None
    return points if len(points) and (np.abs(points) < LARGEST_NUMBER).all() else None


def _kind(contour: Dataset, index: NDArray[np.float64], grid: Grid) -> str:
    """Return why a contour is left out wherever it goes, "" for none of the reasons."""
    corners = len(index) - bool(len(index) > 1 and np.abs(index[0] - index[-1]).max() < 1e-6)
    if contour.get("ContourGeometricType") not in CLOSED or corners < 3:
        return "open"
    if np.ptp(index[:, 2]) > BETWEEN_SLICES:
        return "askew"
    line = index[:, :2]
    beyond = (line.max(axis=0) < -0.5) | (line.min(axis=0) > np.array(grid.shape[:2]) - 0.5)
    return "outside" if beyond.any() else ""


def _planes(drawn: Sequence[_Drawn]) -> Iterator[list[_Drawn]]:
    """Yield the contours of each plane: those whose heights differ by rounding, and no more."""
    if drawn:
        yield from _parted(sorted(drawn, key=lambda one: one.height), BETWEEN_SLICES)


def _parted(drawn: Sequence[_Drawn], gap: float) -> Iterator[list[_Drawn]]:
    """Yield runs of contours, sorted by height, in which no step is longer than `gap`.

    Runs higher than BETWEEN_SLICES are planes of a finer series, and are parted at shorter steps.
    """
    run = [drawn[0]]
    runs = [run]
    for below, above in pairwise(drawn):
        step = above.height - below.height
        if step > gap or (step > SAME_HEIGHT and _differ(below, above)):
            run = []
            runs.append(run)
        run.append(above)
    for run in runs:
        if run[-1].height - run[0].height > BETWEEN_SLICES and gap > SAME_HEIGHT / 16:
            yield from _parted(run, gap / 2)
        else:
            yield run


def _joined(planes: Sequence[list[_Drawn]], k: int) -> list[list[_Drawn]]:
    """Return the planes that go to slice k as one, where all lie on it to the tolerance and may be one.

    Where some of them lie between slices, or they name different images, they come from another series: they add up.
    """
    if len(planes) < 2 or any(_off(plane, k) for plane in planes):
        return [*planes]
    if len({one.image for plane in planes for one in plane if one.image[0]}) > 1:
        return [*planes]
    return [[*chain.from_iterable(planes)]]


def _differ(one: _Drawn, other: _Drawn) -> bool:
    return bool(one.image[0] and other.image[0]) and one.image != other.image


def _height(plane: Sequence[_Drawn]) -> float:
    return float(np.mean([one.height for one in plane]))


def _off(plane: Sequence[_Drawn], k: int) -> bool:
    return abs(_height(plane) - k) > BETWEEN_SLICES


def _inside(plane: Sequence[_Drawn], k: int, grid: Grid) -> NDArray[np.intp]:
    """Return the flat indices of the voxels of slice k inside contours, filled in the box around them."""
    polygons = distinct([one.line for one in plane])
    ends = np.array([*chain.from_iterable((one.min(axis=0), one.max(axis=0)) for one in polygons)])
    low = np.clip(np.floor(ends.min(axis=0)), 0, grid.shape[:2]).astype(int)
    high = np.clip(np.ceil(ends.max(axis=0)) + 1, low, grid.shape[:2]).astype(int)
    i, j = np.nonzero(fill([polygon - low for polygon in polygons], (high[0] - low[0], high[1] - low[1])))
    return np.asarray((k * grid.shape[1] + j + low[1]) * grid.shape[0] + i + low[0])
