"""Frames of a DICOM SEG on the slices of a series: which voxels each covers, and for which segment.

Source: PS3.3 C.8.20.2 and C.7.6.16.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError, InputError
from medseg.io.dicom_compressed import decoded_frames
from medseg.io.dicom_geometry import slice_plane
from medseg.io.dicom_references import whole
from medseg.io.regions import Found, Heights, slice_numbers
from medseg.volume import Affine, Grid

if TYPE_CHECKING:
    from pydicom import Dataset

FRAME_TOLERANCE = 0.1
"""How far, in voxels, the corners of a frame may lie from voxels of the source."""

BACKGROUND = ("125040", "DCM")
"""The code of what is no structure (CID 7150 and following)."""

Places = dict[int, list[NDArray[np.intp]]]


def segments_of(data: Dataset) -> list[tuple[int, Dataset]]:
    """Return number and description of every segment but the background of a label map.

    Raises InputError (`segment_numbers`) where a segment has no number, or two have one.
    """
    numbers = [whole(one, "SegmentNumber") for one in data.SegmentSequence]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise InputError(
            "A segment of the SEG has no number, or the number of another, so it is unknown whose the frames are. "
            "Export the segmentation again.",
            reason="segment_numbers",
        )
    behind = background(data)
    pairs = zip(numbers, data.SegmentSequence, strict=True)
    return [(number, one) for number, one in pairs if number is not None and number not in behind]


def background(data: Dataset) -> set[int]:
    """Return the values of a label map that are no segment; of other kinds of SEG none.

    Those are the padding value, described or not, what is described as background, and 0 where nothing describes it.
    """
    if data.get("SegmentationType") != "LABELMAP":
        return set()
    described = {whole(one, "SegmentNumber"): one for one in data.get("SegmentSequence") or []}
    values = {number for number, one in described.items() if number is not None and is_background(one)}
    values |= {0} - described.keys()
    padding = whole(data, "PixelPaddingValue")
    return values if padding is None else values | {padding}


def places_of(
    data: Dataset, grid: Grid, heights: Heights, threshold: float, wanted: Collection[int], found: Found
) -> Places:
    """Return for each of the `wanted` segments the flat indices into (slices, rows, columns) that its frames cover.

    `found` counts by their numbers the frames that show segments which nobody describes ("undescribed").
    """
    kind = _kind(data)
    known = {number for number, _ in segments_of(data)}
    behind = background(data)
    places: Places = defaultdict(list)
    least = max(1, threshold * int(data.MaximumFractionalValue)) if kind == "FRACTIONAL" else 1
    for groups, pixels in zip(_groups(data), decoded_frames(data), strict=True):
        if kind == "LABELMAP":
            shown = np.unique(pixels).tolist()
            for number in {*shown} - known - behind:
                found["undescribed"][number] += 1
            row, column = np.nonzero(np.isin(pixels, [*wanted]))
        else:
            number = _number(groups)
            inside = pixels >= least
            found["undescribed"][number] += number not in known and bool(inside.any())
            row, column = np.nonzero(inside) if number in wanted else (np.zeros(0, np.intp),) * 2
        if not row.size:
            continue
        flat = _flat(column, row, _to_slices(_plane(groups), grid, heights), (*grid.shape[:2], len(heights)))
        if kind == "LABELMAP":
            _part(pixels[row, column], flat, places)
        else:
            places[number].append(flat)
    return places


def _kind(data: Dataset) -> str:
    """Return the SegmentationType. Raises InputError (`not_seg`) where the SEG lacks what says how to read it."""
    kind = str(data.get("SegmentationType") or "")
    needed = ["PerFrameFunctionalGroupsSequence", "PixelData"]
    needed += ["MaximumFractionalValue"] if kind == "FRACTIONAL" else []
    missing = [name for name in needed if not data.get(name)]
    if kind not in {"BINARY", "FRACTIONAL", "LABELMAP"}:
        missing.insert(0, "SegmentationType (BINARY, FRACTIONAL or LABELMAP)")
    if missing:
        raise InputError(
            f"The SEG does not state its {', '.join(missing)}, so its frames mean nothing. Export it again.",
            reason="not_seg",
        )
    frames, described = whole(data, "NumberOfFrames"), len(data.PerFrameFunctionalGroupsSequence)
    if frames != described:
        raise InputError(
            f"The SEG states {frames} frames and describes {described}, so it is unknown which are which. "
            "Export it again.",
            reason="not_seg",
        )
    if _has_more(data, described):
        raise InputError(
            f"The SEG describes {described} frames and has pixels of more, which would be left out. Export it again.",
            reason="not_seg",
        )
    return kind


def _has_more(data: Dataset, frames: int) -> bool:
    """Return whether pixels that are not compressed go on for another frame behind so many; bytes come in pairs."""
    bits = math.prod(whole(data, name) or 0 for name in ("Rows", "Columns", "BitsAllocated"))
    behind = len(data.PixelData) - 2 * -(-bits * frames // 16)
    return not data["PixelData"].is_undefined_length and behind > 0 and 8 * behind >= bits > 0


def _part(values: NDArray[Any], flat: NDArray[np.intp], places: Places) -> None:
    """Put the flat indices of a frame to the segments that its values name."""
    order = np.argsort(values, kind="stable")
    numbers, starts = np.unique(values[order], return_index=True)
    for value, part in zip(numbers.tolist(), np.split(flat[order], starts[1:]), strict=True):
        places[value].append(part)


def is_background(segment: Dataset) -> bool:
    """Return whether a segment is described as what is no structure."""
    codes = {
        (str(code.get("CodeValue")), str(code.get("CodingSchemeDesignator")))
        for code in segment.get("SegmentedPropertyTypeCodeSequence") or []
    }
    return BACKGROUND in codes or str(segment.get("SegmentLabel") or "").strip().casefold() == "background"


def _number(groups: dict[str, Dataset]) -> int:
    segment = groups.get("SegmentIdentificationSequence")
    number = None if segment is None else whole(segment, "ReferencedSegmentNumber")
    if number is None:
        raise InputError(
            "A frame of the SEG does not say which segment it shows. Export the segmentation again.",
            reason="segment_numbers",
        )
    return number


def _groups(data: Dataset) -> Iterator[dict[str, Dataset]]:
    """Yield for each frame the first items of its functional groups, its own and shared ones, by keyword."""
    shared = [group for one in data.get("SharedFunctionalGroupsSequence") or [] for group in one]
    for own in data.PerFrameFunctionalGroupsSequence:
        yield {group.keyword: group.value[0] for group in [*shared, *own] if group.VR == "SQ" and group.value}


def _plane(groups: dict[str, Any]) -> Affine:
    try:
        plane = slice_plane(
            groups["PlanePositionSequence"].ImagePositionPatient,
            groups["PlaneOrientationSequence"].ImageOrientationPatient,
            groups["PixelMeasuresSequence"].PixelSpacing,
        )
    except (KeyError, AttributeError):
        plane = None
    if plane is None:
        raise GeometryError("A frame of the SEG does not say where it lies. Export it again.", reason="no_geometry")
    return plane


def _to_slices(plane: Affine, grid: Grid, heights: Heights) -> NDArray[np.float64]:
    """Return the matrix (3, 3) that takes (column, row, 1) of a frame to (i, j, number of the slice) of the source.

    Frames across slices with irregular steps have none, and get one that leads nowhere.
    """
    to_index = np.linalg.solve(grid.affine, plane)[:3][:, [0, 1, 3]]
    if (heights == np.arange(len(heights))).all():
        return np.asarray(to_index)
    to_index[2, 2] = slice_numbers(np.asarray(to_index[2, 2:], dtype=np.float64), heights)[0]
    if np.abs(to_index[2, :2]).max() > FRAME_TOLERANCE:
        to_index[2] = np.inf
    return np.asarray(to_index)


def _flat(
    column: NDArray[np.intp], row: NDArray[np.intp], to_index: NDArray[np.float64], shape: tuple[int, int, int]
) -> NDArray[np.intp]:
    """Return the flat indices of pixels of a frame; each has to be a voxel of the source, of this shape."""
    exact = np.round(to_index).astype(np.intp)
    corners = np.array([(0, 0, 1), (column.max(), row.max(), 1), (column.max(), row.min(), 1)])
    steps = np.abs(exact[:, :2])
    if np.abs(corners @ (to_index - exact).T).max() > FRAME_TOLERANCE or (steps.sum(axis=0) != 1).any():
        raise GeometryError(
            "The voxels of the SEG are not those of the source: spacing, direction or position differ. Pass the series "
            "that it was made for.",
            reason="source_grid",
        )
    i, j, k = exact @ np.stack([column, row, np.ones_like(row)])
    if min(i.min(), j.min(), k.min()) < 0 or (np.array([i.max(), j.max(), k.max()]) >= shape).any():
        raise GeometryError(
            "Part of the SEG lies outside the source. Pass the whole series that it was made for.",
            reason="outside_source",
        )
    return np.asarray((k * shape[1] + j) * shape[0] + i)
