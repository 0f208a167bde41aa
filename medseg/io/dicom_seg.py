"""DICOM Segmentation (SEG) objects, written for the series that labels belong to and read onto its grid.

Source: PS3.3 A.51 and C.8.20; label maps came with Supplement 243.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError, InputError, UsageError
from medseg.io.dicom_geometry import slice_plane
from medseg.io.dicom_header import parsing
from medseg.io.dicom_references import (
    UTF8,
    Source,
    check_frame_of_reference,
    code_of,
    equipment,
    headers,
    item,
    located,
    named,
    read_object,
    referring,
    unreferable,
)
from medseg.io.dicom_slice import Slice
from medseg.io.files import written_whole
from medseg.io.regions import Heights, Part, Regions, Wanted, on_grid, regions_of, slice_numbers, volume_of
from medseg.labels import PALETTE, Label, SnomedCode
from medseg.volume import Affine, Grid, Volume

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

FRAME_TOLERANCE = 0.1
"""How far, in voxels, the corners of a frame may lie from voxels of the source."""

LARGEST_VALUE = 65535
"""Of a label map: its pixels and the numbers of segments have 16 bits (PS3.3 C.8.20.2)."""

SIDES: dict[Literal["left", "right"], tuple[str, str, str]] = {
    "left": ("7771000", "SCT", "Left"),
    "right": ("24028007", "SCT", "Right"),
}
"""Modifiers of a structure that lies on one side (CID 244)."""

Places = dict[int, list[NDArray[np.intp]]]


def save_dicom_seg(
    labels: Volume,
    path: str | os.PathLike[str],
    *,
    source: Source,
    table: Sequence[Label] = (),
    labelmap: bool = False,
    algorithm: str | None = "medseg",
) -> Path | None:
    """Write labels as a DICOM SEG that refers to the slices of `source`, and return its path; None if there are none.

    Nothing found is a result and no error: then no file is written, since a SEG cannot be empty. `labels` is a label
    map, or one mask for each label of the table; it has the voxels of the source, in any order of axes (those of the
    regular grid for slices with irregular steps, each of which takes the labels nearest to it). The encoding is
    BINARY, one frame for each slice on which a label occurs and labels numbered from 1; or LABELMAP, which is smaller,
    keeps the values and is young (2023). Labels that overlap are always BINARY. `algorithm` names what made the
    labels (None: unknown). Raises GeometryError where the grids differ, InputError (`label_values`) for values that a
    LABELMAP cannot hold, OutputError (`unreferable_source`) where the source lacks identifiers, and what reading the
    headers of the source raises.
    """
    series, grid = located(source)
    regions = regions_of(on_grid(labels, grid), table, series.heights)
    return write(regions, series.slices, path, labelmap=labelmap, algorithm=algorithm)


def write(
    regions: Regions,
    slices: Sequence[Slice],
    path: str | os.PathLike[str],
    *,
    labelmap: bool = False,
    algorithm: str | None = "medseg",
) -> Path | None:
    """Write regions, a frame for each of the slices, as `save_dicom_seg` does; the slices may lie anywhere."""
    from pydicom.uid import RLELossless

    if not regions.labels:
        return None
    path = Path(path)
    if labelmap and regions.frames.ndim == 4:
        warnings.warn("Labels overlap, which a label map cannot hold: the SEG is binary.", stacklevel=3)
        labelmap = False
    largest = max(label.value for label in regions.labels)
    if labelmap and largest > LARGEST_VALUE:
        raise InputError(
            f"A label map SEG holds values up to {LARGEST_VALUE}, and the labels have {largest}. Write a binary SEG, "
            "which numbers them from 1.",
            path=path,
            reason="label_values",
        )
    sources = headers(slices)
    with referring(path, slices):
        if "NumberOfFrames" in sources[0]:
            sources, regions = _enhanced(slices, sources, regions)
        segmentation = _segmentation(regions, sources, labelmap, algorithm)
        if labelmap:
            # By name, since GDCM ends the process for some sizes of frames (odd numbers of pixels).
            segmentation.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        with written_whole(path) as beside:
            segmentation.save_as(beside, enforce_file_format=True)
    return path


def load_dicom_seg(
    path: str | os.PathLike[str], *, source: Source, threshold: float = 0.5
) -> tuple[Volume, tuple[Label, ...]]:
    """Return the labels of a DICOM SEG on the grid of `source`, and their table.

    A label map, or where segments overlap one mask for each label of the table. Values are the numbers of segments.
    Frames may lie on some slices only, or on part of them, along any axes of the source. Of a FRACTIONAL segmentation,
    voxels of at least `threshold` belong to a segment. Codes other than SNOMED CT are not kept.
    Raises UnreadableFile or InputError (`not_seg`) for other files, GeometryError (`source_grid`, `outside_source`,
    `frame_of_reference`) where the segmentation has other voxels than the source.
    """
    series, grid = located(source)
    parts = read_parts(path, series, threshold=threshold)
    return volume_of(parts, grid, series.heights), tuple(label for label, _ in parts)


def read_parts(
    path: str | os.PathLike[str], source: Source, *, threshold: float = 0.5, wanted: Wanted = lambda _: True
) -> list[Part]:
    """Return the segments whose names are `wanted`, each with the flat indices into (slices, rows, columns).

    Raises what `load_dicom_seg` raises.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"The threshold is a share of a voxel, above 0 and up to 1; here it is {threshold}.")
    path = Path(path)
    series, grid = located(source)
    with parsing(path):
        data = read_object(path, "SEG", "SegmentSequence")
        check_frame_of_reference(str(data.get("FrameOfReferenceUID", "")), series, path)
        table = [_label(one) for one in data.SegmentSequence if one.SegmentNumber > 0]
        table = [label for label in table if wanted(label.name)]
        places = _places(data, grid, series.heights, threshold) if table else {}
    nowhere = [np.zeros(0, np.intp)]
    return [(label, np.unique(np.concatenate(places.get(label.value, nowhere)))) for label in table]


def _segmentation(regions: Regions, sources: list[Dataset], labelmap: bool, algorithm: str | None) -> Dataset:
    from highdicom.seg import Segmentation
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    frames, numbers = regions.frames, [*range(1, len(regions.labels) + 1)]
    if labelmap:
        numbers = [label.value for label in regions.labels]
        frames = np.array([0, *numbers], np.min_scalar_type(max(numbers)))[frames]
    own = equipment()
    return Segmentation(
        source_images=sources,
        pixel_array=frames,
        segmentation_type="LABELMAP" if labelmap else "BINARY",
        segment_descriptions=[
            _description(number, label, algorithm) for number, label in zip(numbers, regions.labels, strict=True)
        ],
        series_instance_uid=generate_uid(),
        series_number=900,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=own["Manufacturer"],
        manufacturer_model_name=own["ManufacturerModelName"],
        software_versions=own["SoftwareVersions"],
        device_serial_number=own["DeviceSerialNumber"],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label="SEGMENTATION",
        series_description="Segmentation",
        specific_character_set=UTF8,
    )


def _enhanced(slices: Sequence[Slice], sources: Sequence[Dataset], regions: Regions) -> tuple[list[Dataset], Regions]:
    """Return the one file of an enhanced series as highdicom takes it, and the regions on each of its frames.

    Frames that are no slice of the stack are empty and left out; they keep the numbers of the others right.
    """
    if len({part.path for part in slices}) > 1:
        raise unreferable("The frames of the source lie in several enhanced files", slices[0].path)
    source = sources[0]
    # highdicom wants a position of its own for each frame, of empty ones too.
    places = {n: [0, 0, 1e6 + n] for n in range(source.NumberOfFrames)}
    places |= {part.frame: header.ImagePositionPatient for part, header in zip(slices, sources, strict=True)}
    measures = item(PixelSpacing=source.PixelSpacing, SliceThickness=source.SliceThickness)
    orientation = item(ImageOrientationPatient=source.ImageOrientationPatient)
    source.SharedFunctionalGroupsSequence = [
        item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[orientation])
    ]
    source.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=place)]) for place in places.values()
    ]
    frames = np.zeros((source.NumberOfFrames, *regions.frames.shape[1:]), regions.frames.dtype)
    frames[[part.frame for part in slices]] = regions.frames
    return [source], Regions(regions.labels, frames)


def _description(number: int, label: Label, algorithm: str | None) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    described = SegmentDescription(
        segment_number=number,
        segment_label=named(label.name),
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=CodedConcept(*code_of(label)),
        algorithm_type="AUTOMATIC" if algorithm else "SEMIAUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=named(algorithm or "unknown"),
            family=codes.DCM.ArtificialIntelligence,
            version=equipment()["SoftwareVersions"] if algorithm else "unknown",
        ),
        display_color=CIELabColor.from_string(label.color),
    )
    if label.snomed is not None and label.snomed.laterality:
        (kind,) = described.SegmentedPropertyTypeCodeSequence
        kind.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept(*SIDES[label.snomed.laterality])]
    return described


def _label(segment: Dataset) -> Label:
    from highdicom.color import CIELabColor

    number = int(segment.SegmentNumber)
    color = PALETTE[(number - 1) % len(PALETTE)]
    if segment.get("RecommendedDisplayCIELabValue"):
        color = "#" + bytes(CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb(clip=True)).hex()
    (code,) = segment.get("SegmentedPropertyTypeCodeSequence") or [{}]
    snomed = None
    if code.get("CodingSchemeDesignator") == "SCT" and code.get("CodeValue"):
        modifiers = {str(one.get("CodeValue")) for one in code.get("SegmentedPropertyTypeModifierCodeSequence") or []}
        sides = [side for side, (value, *_) in SIDES.items() if value in modifiers]
        snomed = SnomedCode(
            value=str(code.CodeValue),
            meaning=str(code.get("CodeMeaning", "")),
            laterality=sides[0] if len(sides) == 1 else None,
        )
    return Label(value=number, name=str(segment.get("SegmentLabel") or f"label {number}"), color=color, snomed=snomed)


def _places(data: Dataset, grid: Grid, heights: Heights, threshold: float) -> Places:
    """Return for each segment the flat indices into (slices, rows, columns) that its frames cover."""
    kind = data.SegmentationType
    places: Places = defaultdict(list)
    least = max(1, threshold * int(data.MaximumFractionalValue)) if kind == "FRACTIONAL" else 1
    for groups, pixels in zip(_groups(data), _frames(data), strict=True):
        row, column = np.nonzero(pixels >= least)
        if not row.size:
            continue
        flat = _flat(column, row, _to_slices(_plane(groups), grid, heights), (*grid.shape[:2], len(heights)))
        if kind == "LABELMAP":
            values = pixels[row, column]
            order = np.argsort(values, kind="stable")
            numbers, starts = np.unique(values[order], return_index=True)
            for value, part in zip(numbers.tolist(), np.split(flat[order], starts[1:]), strict=True):
                places[value].append(part)
        else:
            places[int(groups["SegmentIdentificationSequence"].ReferencedSegmentNumber)].append(flat)
    return places


def _frames(data: Dataset) -> Iterator[NDArray[Any]]:
    """Yield the stored values (rows, columns) of each frame."""
    from pydicom.pixels.utils import iter_pixels

    if data.BitsAllocated > 1 or data.file_meta.TransferSyntaxUID.is_encapsulated:
        yield from iter_pixels(data, raw=True)
        return
    # pydicom takes single frames only where they begin with a byte of their own; here they follow bit on bit.
    packed, size = np.frombuffer(data.PixelData, np.uint8), data.Rows * data.Columns
    for first in range(0, int(data.NumberOfFrames) * size, size):
        start, skipped = divmod(first, 8)
        bits = np.unpackbits(packed[start : (first + size + 7) // 8], bitorder="little")
        yield bits[skipped : skipped + size].reshape(data.Rows, data.Columns)


def _groups(data: Dataset) -> Iterator[dict[str, Dataset]]:
    """Yield for each frame the first items of its functional groups, its own and shared ones, by keyword."""
    (shared,) = data.get("SharedFunctionalGroupsSequence") or [[]]
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
