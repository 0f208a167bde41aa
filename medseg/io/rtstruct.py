"""DICOM RT Structure Sets, written for the series that labels belong to and read onto its grid.

Source: PS3.3 A.19, C.8.8.5 (structure set), C.8.8.6 (contours) and C.8.8.8 (observations).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError
from medseg.io.contours import SNAP_DECIMALS, Polygon, fill, trace
from medseg.io.dicom_geometry import LPS_TO_RAS
from medseg.io.dicom_header import parsing
from medseg.io.dicom_references import (
    PATIENT_AND_STUDY,
    UTF8,
    Source,
    check_frame_of_reference,
    code_of,
    color_of,
    equipment,
    headers,
    item,
    located,
    lps,
    named,
    now,
    read_object,
    referring,
)
from medseg.io.dicom_slice import Slice
from medseg.io.files import written_whole
from medseg.io.regions import Heights, Part, Regions, Wanted, on_grid, regions_of, slice_numbers, volume_of
from medseg.labels import PALETTE, Label
from medseg.volume import Grid, Volume

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

DECIMALS = 4
"""Decimals of a coordinate in mm: off by at most 0.00005 mm, and 16 characters reach beyond a kilometre."""

STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management (retired), by which RT objects still refer to their study."""

CLOSED = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})

BETWEEN_SLICES = 0.1
"""A contour that lies farther from a slice than this share of a step is taken to the nearest one with a warning."""

LEFT_OUT = {
    "open": "are open lines or points",
    "askew": "are not parallel to the slices",
    "outside": "lie outside the source",
}
"""Why a contour encloses no voxel of the source."""


def save_rtstruct(
    labels: Volume,
    path: str | os.PathLike[str],
    *,
    source: Source,
    table: Sequence[Label] = (),
    algorithm: str | None = "medseg",
) -> Path | None:
    """Write labels as an RT Structure Set that refers to the slices of `source`; return its path, None without labels.

    Nothing found is a result and no error: then no file is written. `labels` is a label map, or one mask for each label
    of the table, which may overlap; it has the voxels of the source, in any order of axes. Closed contours run along
    the edges of voxels, so that they enclose the same voxels in every program; holes are joined to their outline. ROI
    numbers are the values of the labels. `algorithm` names what made them (None: unknown). Raises what `save_dicom_seg`
    raises.
    """
    series, grid = located(source)
    return write(regions_of(on_grid(labels, grid), table, series.heights), series.slices, path, algorithm=algorithm)


def write(
    regions: Regions, slices: Sequence[Slice], path: str | os.PathLike[str], *, algorithm: str | None = "medseg"
) -> Path | None:
    """Write regions, a frame for each of the slices, as `save_rtstruct` does; the slices may lie anywhere."""
    if not regions.labels:
        return None
    path = Path(path)
    sources = headers(slices)
    with referring(path, slices):
        data = _structure_set(regions.labels, sources, algorithm)
        contours = _contours(regions, slices, sources)
        data.ROIContourSequence = [
            item(ROIDisplayColor=[*color_of(label)], ReferencedROINumber=label.value, ContourSequence=contours[place])
            for place, label in enumerate(regions.labels)
        ]
        with written_whole(path) as beside:
            data.save_as(beside, enforce_file_format=True)
    return path


def load_rtstruct(path: str | os.PathLike[str], *, source: Source) -> tuple[Volume, tuple[Label, ...]]:
    """Return the structures of an RT Structure Set on the grid of `source`, and their table.

    A label map, or where structures overlap one mask for each label of the table. A voxel belongs to a structure if its
    center lies inside an odd number of its contours in that plane, so that one inside another is a hole. Values are the
    ROI numbers. A warning counts the contours that are open, points, askew or outside, which are left out, and those
    that lie between slices, which go to the nearest. Raises UnreadableFile or InputError (`not_rtstruct`) for other
    files, GeometryError where the frame of reference is another (`frame_of_reference`) or all contours lie outside
    (`outside_source`).
    """
    series, grid = located(source)
    parts, found = read_parts(path, series)
    _report(found, Path(path))
    return volume_of(parts, grid, series.heights), tuple(label for label, _ in parts)


def read_parts(
    path: str | os.PathLike[str], source: Source, *, wanted: Wanted = lambda _: True
) -> tuple[list[Part], Counter[str]]:
    """Return the structures whose names are `wanted`, each with the flat indices into (slices, rows, columns).

    Beside them, how many contours were used, taken to the nearest slice ("between"), or LEFT_OUT for which reason.
    Raises what `load_rtstruct` raises, but for contours that lie outside.
    """
    path = Path(path)
    series, grid = located(source)
    with parsing(path):
        data = read_object(path, "RTSTRUCT", "StructureSetROISequence")
        for roi in data.StructureSetROISequence:
            if not roi.get("ROIName") or wanted(str(roi.ROIName)):
                check_frame_of_reference(str(roi.get("ReferencedFrameOfReferenceUID") or ""), series, path)
        return _parts(data, _Slices(grid, series.heights), wanted)


@dataclass(frozen=True)
class _Slices:
    """Where contours go: the slices of a series at these k of its grid."""

    grid: Grid
    heights: Heights

    def index(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (i, j, number of the slice) of points in LPS mm."""
        index = self.grid.to_index(points @ LPS_TO_RAS[:3, :3])
        index[:, 2] = slice_numbers(index[:, 2], self.heights)
        return index


def _structure_set(labels: Sequence[Label], sources: Sequence[Dataset], algorithm: str | None) -> Dataset:
    """Return the object without its contours."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    first, (date, time) = sources[0], now()
    frame = first.FrameOfReferenceUID
    instances = {one.SOPInstanceUID: one for one in sources}.values()
    series = item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=[_image(one) for one in instances])
    study = item(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    data = item(
        SpecificCharacterSet=UTF8,
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID=generate_uid(),
        InstanceCreationDate=date,
        InstanceCreationTime=time,
        **{name: first.get(name) for name in ("StudyInstanceUID", *PATIENT_AND_STUDY)},
        Modality="RTSTRUCT",
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=901,
        SeriesDescription="Segmentation",
        OperatorsName="",
        **equipment(),
        FrameOfReferenceUID=frame,
        PositionReferenceIndicator=first.PositionReferenceIndicator,
        StructureSetLabel="SEGMENTATION",
        StructureSetDate=date,
        StructureSetTime=time,
        ReferencedFrameOfReferenceSequence=[item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])],
        StructureSetROISequence=[
            item(
                ROINumber=label.value,
                ReferencedFrameOfReferenceUID=frame,
                ROIName=named(label.name),
                ROIGenerationAlgorithm="AUTOMATIC" if algorithm else "",
                **({"ROIGenerationDescription": named(algorithm)} if algorithm else {}),
            )
            for label in labels
        ],
        RTROIObservationsSequence=[_observation(number, label) for number, label in enumerate(labels, start=1)],
        ApprovalStatus="UNAPPROVED",
    )
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    # With explicit value representations a contour could have 64 kB at most.
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return data


def _observation(number: int, label: Label) -> Dataset:
    value, scheme, meaning = code_of(label)
    code = item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)
    return item(
        ObservationNumber=number,
        ReferencedROINumber=label.value,
        RTROIIdentificationCodeSequence=[code],
        RTROIInterpretedType="",
        ROIInterpreter="",
    )


def _image(source: Dataset, frame: int | None = None) -> Dataset:
    """Return the reference to a file, or to one frame of an enhanced one, counted from 0."""
    image = item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)
    if frame is not None and "NumberOfFrames" in source:
        image.ReferencedFrameNumber = frame + 1
    return image


def _contours(regions: Regions, slices: Sequence[Slice], sources: Sequence[Dataset]) -> dict[int, list[Dataset]]:
    """Return the contours of each label, by its place in the table."""
    contours: dict[int, list[Dataset]] = defaultdict(list)
    for frame, part, source in zip(regions.frames, slices, sources, strict=True):
        if part.plane is None:
            raise GeometryError("A slice of the source does not say where it lies.", reason="no_geometry")
        image = item(ContourImageSequence=[_image(source, part.frame)])["ContourImageSequence"]
        for place, polygon in _outlines(frame):
            contours[place].append(_contour(lps(polygon, part.plane), image))
    return contours


def _outlines(frame: NDArray[np.generic]) -> Iterator[tuple[int, Polygon]]:
    """Yield (place of the label, polygon) for what a frame shows, traced in the box around each label."""
    from scipy.ndimage import find_objects

    if frame.ndim == 3:
        boxes = [(find_objects(mask.astype(np.uint8)) or [None])[0] for mask in np.moveaxis(frame, -1, 0)]
    else:
        boxes = find_objects(frame)
    for place, box in enumerate(boxes):
        if box is not None:
            part = frame[box]
            mask = part == place + 1 if part.ndim == 2 else part[..., place] > 0
            rows, columns = box
            for polygon in trace(mask.T):
                yield place, polygon + np.array([columns.start, rows.start])


def _contour(points: NDArray[np.float64], image: DataElement) -> Dataset:
    """Return a contour on a slice; all contours of one slice share the element that names it."""
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    contour = item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=len(points))
    contour[image.tag] = image
    # As the bytes of the file, since objects for millions of numbers would take minutes. Adding 0 makes 0 of -0.
    text = "\\".join(map(str, (np.round(points, DECIMALS) + 0.0).ravel().tolist())).encode()
    text += b" " * (len(text) % 2)
    tag = Tag("ContourData")
    contour[tag] = RawDataElement(tag, "DS", len(text), text, 0, True, True)
    contour.set_original_encoding(True, True, "iso8859")
    return contour


def _parts(data: Dataset, slices: _Slices, wanted: Wanted) -> tuple[list[Part], Counter[str]]:
    """Return each structure with the flat indices into (slices, rows, columns) it covers, and what was met."""
    drawn: dict[int, list[Dataset]] = defaultdict(list)
    for one in data.get("ROIContourSequence") or []:
        drawn[int(one.ReferencedROINumber)].append(one)
    numbers = [int(roi.ROINumber) for roi in data.StructureSetROISequence]
    usable = min(numbers, default=1) > 0 and len(set(numbers)) == len(numbers)
    found: Counter[str] = Counter()
    parts: list[Part] = []
    for place, (number, roi) in enumerate(zip(numbers, data.StructureSetROISequence, strict=True), start=1):
        value = number if usable else place
        color = PALETTE[(value - 1) % len(PALETTE)]
        if stated := next((one.ROIDisplayColor for one in drawn[number] if one.get("ROIDisplayColor")), None):
            color = "#" + bytes(min(max(int(part), 0), 255) for part in stated).hex()
        label = Label(value=value, name=str(roi.get("ROIName") or f"label {value}"), color=color)
        if wanted(label.name):
            contours = [contour for one in drawn[number] for contour in one.get("ContourSequence") or []]
            parts.append((label, _covered(contours, slices, found)))
    return parts, found


def _covered(contours: Sequence[Dataset], slices: _Slices, found: Counter[str]) -> NDArray[np.intp]:
    planes: dict[tuple[int, float], list[Polygon]] = defaultdict(list)
    for contour in contours:
        points = _points(contour)
        index = slices.index(points)
        height = float(index[:, 2].mean()) if len(index) else 0.0
        k = int(np.floor(round(height, 2) + 0.5))  # from halfway up: half to even would leave every other slice empty
        kind = _kind(contour, index, k, len(slices.heights))
        found[kind] += 1
        if kind not in LEFT_OUT:
            planes[k, round(height, 2)].append(index[:, :2])
    covered = [_inside(_distinct(polygons), k, slices.grid) for (k, _), polygons in planes.items()]
    return np.unique(np.concatenate(covered)) if covered else np.zeros(0, np.intp)


def _distinct(polygons: Sequence[Polygon]) -> list[Polygon]:
    """Return polygons without copies, as some programs export them: two of one would leave nothing inside."""
    return [*{polygon.round(SNAP_DECIMALS).tobytes(): polygon for polygon in polygons}.values()]


def _points(contour: Dataset) -> NDArray[np.float64]:
    raw = contour.get_item("ContourData")
    text = getattr(raw, "value", None)
    numbers = text.rstrip(b" \0").split(b"\\") if isinstance(text, bytes) else contour.get("ContourData") or []
    return np.array(numbers, dtype=np.float64).reshape(-1, 3)


def _kind(contour: Dataset, index: NDArray[np.float64], k: int, count: int) -> str:
    if contour.get("ContourGeometricType") not in CLOSED or len(index) < 3:
        return "open"
    if np.ptp(index[:, 2]) > BETWEEN_SLICES:
        return "askew"
    if not 0 <= k < count:
        return "outside"
    return "between" if abs(index[:, 2].mean() - k) > BETWEEN_SLICES else "used"


def _inside(polygons: Sequence[Polygon], k: int, grid: Grid) -> NDArray[np.intp]:
    """Return the flat indices of the voxels of slice k inside polygons, filled in the box around them."""
    ends = np.array([*chain.from_iterable((one.min(axis=0), one.max(axis=0)) for one in polygons)])
    low = np.clip(np.floor(ends.min(axis=0)), 0, grid.shape[:2]).astype(int)
    high = np.clip(np.ceil(ends.max(axis=0)) + 1, low, grid.shape[:2]).astype(int)
    i, j = np.nonzero(fill([polygon - low for polygon in polygons], (high[0] - low[0], high[1] - low[1])))
    return np.asarray((k * grid.shape[1] + j + low[1]) * grid.shape[0] + i + low[0])


def _report(found: Counter[str], path: Path) -> None:
    total = found.total()
    if found["outside"] == total > 0:
        raise GeometryError(
            "All contours lie outside the source. Pass the series that they were drawn on.",
            path=path,
            reason="outside_source",
        )
    told = [f"{found[kind]} {why} and are left out" for kind, why in LEFT_OUT.items() if found[kind]]
    if found["between"]:
        told.append(f"{found['between']} lie between slices and are taken to the nearest")
    if told:
        warnings.warn(f"Of {total} contours, {'; '.join(told)}.", stacklevel=3)
