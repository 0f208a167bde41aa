"""DICOM Segmentation (SEG) objects, written for the series that labels belong to and read onto its grid.

Source: PS3.3 A.51 and C.8.20; label maps came with Supplement 243.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from medseg.errors import InputError, UsageError
from medseg.io.dicom_header import parsing
from medseg.io.dicom_references import (
    OTHER_FRAME,
    UTF8,
    Source,
    code_of,
    equipment,
    headers,
    instances,
    item,
    located,
    named,
    other_frame_of_reference,
    read_object,
    referring,
    unreferable,
)
from medseg.io.dicom_slice import Slice
from medseg.io.files import written_whole
from medseg.io.regions import Found, Part, Regions, Wanted, labels_met, on_grid, regions_of, volume_of
from medseg.io.seg_frames import is_background, places_of, segments_of
from medseg.labels import PALETTE, Label, SnomedCode
from medseg.volume import Volume

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

LARGEST_VALUE = 65535
"""Of a label map, and of the number of a segment: both have 16 bits (PS3.3 C.8.20.2)."""

SIDES: dict[Literal["left", "right"], tuple[str, str, str]] = {
    "left": ("7771000", "SCT", "Left"),
    "right": ("24028007", "SCT", "Right"),
}
"""Modifiers of a structure that lies on one side (CID 244)."""

TOLD = {
    "undescribed": "Frames of segments that nobody describes are left out: {}.",
    "renumbered": "Labels are numbered from 1 in the order of the segments, since the number of one is not above 0.",
    "background": "Segments with the number of the background are left out: {}.",
}
"""What has to be said of the segments of a SEG."""


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
    if len(regions.labels) > LARGEST_VALUE:
        raise InputError(
            f"A SEG holds up to {LARGEST_VALUE} segments, and there are {len(regions.labels)} labels. Save NIfTI.",
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

    A label map, or where segments overlap one mask for each label of the table. Values are the numbers of segments, or
    1, 2, 3 ... in their order where one is numbered 0. Frames may lie on some slices only, or on part of them, along
    any axes of the source. Of a FRACTIONAL segmentation, voxels of at least `threshold` belong to a segment. Codes
    other than SNOMED CT are not kept. A warning says which frames and segments are left out or empty.
    Raises UnreadableFile or InputError (`not_seg`) for other files, InputError for segments that have one number
    (`segment_numbers`) and frames that nothing decodes (`compressed_no_codec`, `undecodable`), GeometryError
    (`source_grid`, `outside_source`, `frame_of_reference`) where the segmentation has other voxels than the source.
    """
    series, grid = located(source)
    parts, found = read_parts(path, series, threshold=threshold)
    if found["frame"].total():
        warnings.warn(OTHER_FRAME, stacklevel=2)
    if told := told_of(found):
        warnings.warn(told, stacklevel=2)
    return volume_of(parts, grid, series.heights), tuple(label for label, _ in parts)


def read_parts(
    path: str | os.PathLike[str], source: Source, *, threshold: float = 0.5, wanted: Wanted = lambda _: True
) -> tuple[list[Part], Found]:
    """Return the segments whose names are `wanted`, each with the flat indices into (slices, rows, columns).

    Beside them how often what TOLD lists was met, another frame of reference ("frame") and no voxel ("empty").
    Raises what `load_dicom_seg` raises.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"The threshold is a share of a voxel, above 0 and up to 1; here it is {threshold}.")
    path, found = Path(path), Found(Counter)
    series, grid = located(source)
    with parsing(path):
        data = read_object(path, "SEG", "SegmentSequence")
        frame = str(data.get("FrameOfReferenceUID") or "")
        found["frame"][0] += other_frame_of_reference(frame, series, path, lambda: _instances(data))
        segments = segments_of(data)
        from_one = all(number > 0 for number, _ in segments)
        labels = {
            number: _label(one, number if from_one else place) for place, (number, one) in enumerate(segments, start=1)
        }
        labels = {number: label for number, label in labels.items() if wanted(label.name)}
        found["renumbered"][0] += 0 if from_one else len(segments)
        structures = [one for one in data.SegmentSequence if not is_background(one)]
        found["background"][0] += sum(one not in [kept for _, kept in segments] for one in structures)
        places = places_of(data, grid, series.heights, threshold, labels.keys(), found)
        if found["undescribed"].total() and (not from_one or found["undescribed"][0]):
            raise InputError(
                "The segments of the SEG are described with other numbers than its frames show, one of them from 0, so "
                "it is unknown whose the frames are. Export the segmentation again.",
                reason="segment_numbers",
            )
    nowhere = [np.zeros(0, np.intp)]
    parts: list[Part] = [
        (label, np.unique(np.concatenate(places.get(number, nowhere)))) for number, label in labels.items()
    ]
    for label, where in parts:
        found["empty"][label.value] += not where.size
    return parts, found


def told_of(found: Found) -> str:
    """Return what has to be said of the segments of a SEG, "" for nothing."""
    told = [text.format(count) for kind, text in TOLD.items() if (count := found[kind].total())]
    if found["empty"].total():
        told.append(f"Segments that cover no voxel: {labels_met(found['empty'])}.")
    return " ".join(told)


def _instances(data: Dataset) -> set[str]:
    """Return the SOPInstanceUIDs that the frames were made from, as the object or its frames say."""
    series = instances(data.get("ReferencedSeriesSequence") or [])
    return series or instances(
        made
        for groups in data.PerFrameFunctionalGroupsSequence
        for derived in groups.get("DerivationImageSequence") or []
        for made in derived.get("SourceImageSequence") or []
    )


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


def _label(segment: Dataset, value: int) -> Label:
    code = next(iter(segment.get("SegmentedPropertyTypeCodeSequence") or [{}]))
    snomed = None
    if code.get("CodingSchemeDesignator") == "SCT" and code.get("CodeValue"):
        modifiers = {str(one.get("CodeValue")) for one in code.get("SegmentedPropertyTypeModifierCodeSequence") or []}
        sides = [side for side, (value, *_) in SIDES.items() if value in modifiers]
        snomed = SnomedCode(
            value=str(code.CodeValue),
            meaning=str(code.get("CodeMeaning", "")),
            laterality=sides[0] if len(sides) == 1 else None,
        )
    name = str(segment.get("SegmentLabel") or f"label {value}")
    return Label(value=value, name=name, color=_color(segment, value), snomed=snomed)


def _color(segment: Dataset, value: int) -> str:
    """Return the color that a segment states, one of the palette where it states none or none to show."""
    from highdicom.color import CIELabColor

    stated = segment.get("RecommendedDisplayCIELabValue")
    try:
        return "#" + bytes(CIELabColor.from_dicom_value(stated).to_rgb(clip=True)).hex()
    except (ValueError, TypeError):
        return PALETTE[(value - 1) % len(PALETTE)]
