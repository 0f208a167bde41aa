"""Slices of DICOM files: what the header of each says, and what forbids to read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import UnreadableFile
from medseg.io.dicom_file import PIXELS, Found, parse
from medseg.io.dicom_geometry import Problem, slice_plane
from medseg.io.dicom_header import Header, damage, frame_headers, parsing
from medseg.io.dicom_mosaic import TAGS as MOSAIC_TAGS
from medseg.io.dicom_pixels import Located, Native, locate
from medseg.io.dicom_refusals import slice_problem
from medseg.volume import Affine

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag

VARIANTS = (
    "ImageType",
    "EchoNumbers",
    "EchoTime",
    "InversionTime",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "StackID",
    "ContrastBolusAgent",
    "ConvolutionKernel",
    "KVP",
    "FlipAngle",
    "RepetitionTime",
    "SequenceName",
    "NominalPercentageOfCardiacPhase",
    "SeriesNumber",
    "SeriesDescription",
    "FrameReferenceTime",
    "AcquisitionNumber",
    "AcquisitionTime",
    "AcquisitionDateTime",
    "ContentTime",
)
"""What may tell apart several stacks in one series, the most telling first."""

TEXTS = frozenset({"ImageType", "StackID", "ContrastBolusAgent", "ConvolutionKernel"})
"""Those of them that are no numbers and no times."""

HEADER_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("Modality", "InstanceNumber", *VARIANTS),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    *("Rows", "Columns", "NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "SpecificCharacterSet"),
    "RedPaletteColorLookupTableDescriptor",
)


STUDY_UID = 0x0020000D
"""The tag of StudyInstanceUID."""

ENDS_EARLY = "A DICOM file ends before it names its series. Copy or export it again."
CUT_SHORT = "The pixels of a DICOM file are cut short. Copy or export it again."


@dataclass(frozen=True, eq=False)
class Slice:
    """The header of one slice; `problem` says what forbids to read it. What it does not state is blank or NaN.

    `frame` counts from 0 in the file and is 0 where the file has but one. `shape` is (columns, rows). `plane`, if
    known, takes (column, row, 0) of a pixel to RAS+ mm. `thickness_mm` is the step that the header states, or else the
    thickness, and `extent_mm` the larger of the two. `slope` and `intercept` make real values of the stored ones; they
    are 1 and 0 where the header does not state both (`is_rescaled`).
    `native` says where they lie in the file, None where they have to be decoded.
    """

    path: Path
    frame: int
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    series_number: str
    frame_of_reference_uid: str
    modality: str
    description: str
    contrast: bool
    is_localizer: bool
    variants: tuple[str, ...]
    shape: tuple[int, int]
    plane: Affine | None
    thickness_mm: float
    extent_mm: float
    instance_number: float
    slope: float
    intercept: float
    is_rescaled: bool
    problem: Problem | None
    native: Native | None


def read_headers(path: Path) -> list[Slice]:
    """Return the header of each slice of a DICOM file, its pixels left unread; none for DICOMDIR and other files.

    A file of enhanced CT, MR or PET gives a slice for each of its frames.
    Raises UnreadableFile where the file is DICOM and its header or its pixels are cut off.
    """
    found = Found(PIXELS, _tags())
    with parsing(path), path.open("rb") as file:
        parsed = parse(file, found, found.wanted)
        if parsed is None or parsed.is_directory:
            return []
        data = parsed.data
        if "SeriesInstanceUID" not in data and "Rows" not in data:
            raise UnreadableFile(ENDS_EARLY, path=path)
        headers, description = frame_headers(data), _described(data)
        pixels = locate(parsed, found, headers[0], len(headers))
        slices = [_slice(path, frame, header, description, pixels) for frame, header in enumerate(headers)]
        if not pixels.are_whole and any(part.problem is None for part in slices):
            raise UnreadableFile(CUT_SHORT, path=path)
        return slices


def read_study_uid(path: Path) -> str | None:
    """Return the StudyInstanceUID of a DICOM file, "" where it states none; None for DICOMDIR and other files.

    Nothing behind that element is read. Raises UnreadableFile where the file is DICOM and ends before it.
    """
    from pydicom.tag import Tag

    ended = True

    def behind(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        nonlocal ended
        ended = tag <= STUDY_UID
        return not ended

    with parsing(path), path.open("rb") as file:
        parsed = parse(file, behind, [Tag(STUDY_UID)])
        if parsed is None or parsed.is_directory:
            return None
        if ended:
            raise UnreadableFile(ENDS_EARLY, path=path)
        return str(parsed.data.get("StudyInstanceUID") or "")


@cache
def _tags() -> frozenset[BaseTag]:
    """Return the tags of a header, as pydicom wants them."""
    from pydicom.tag import Tag

    return frozenset(map(Tag, (*HEADER_TAGS, *MOSAIC_TAGS)))


def _described(data: Dataset) -> str:
    """Return the description of the series, in the character set of its file."""
    try:
        return str(data.get("SeriesDescription") or "")
    except damage():
        return ""


def _slice(path: Path, frame: int, header: Header, description: str, pixels: Located) -> Slice:
    lengths = [header.number(name) for name in ("SpacingBetweenSlices", "SliceThickness")]
    thicknesses = [length for length in lengths if length > 0]
    plane = _plane(header)
    return Slice(
        path=path,
        frame=frame,
        sop_instance_uid=header.text("SOPInstanceUID"),
        study_uid=header.text("StudyInstanceUID"),
        series_uid=header.text("SeriesInstanceUID"),
        series_number=header.text("SeriesNumber"),
        frame_of_reference_uid=header.text("FrameOfReferenceUID"),
        modality=header.text("Modality"),
        description=description,
        contrast=header.text("ContrastBolusAgent").upper() not in {"", "NO", "NONE"},
        is_localizer="LOCALIZER" in header.text("ImageType").split("\\"),
        variants=tuple(_variant(header, name) for name in VARIANTS),
        shape=(_count(header.number("Columns")), _count(header.number("Rows"))),
        plane=plane,
        thickness_mm=next(iter(thicknesses), math.nan),
        extent_mm=max(thicknesses, default=math.nan),
        instance_number=header.number("InstanceNumber"),
        slope=header.number("RescaleSlope", blank=1.0),
        intercept=header.number("RescaleIntercept", blank=0.0),
        is_rescaled=all(header.numbers(name) for name in ("RescaleSlope", "RescaleIntercept")),
        problem=slice_problem(header, pixels.kind, placed=plane is not None) or pixels.problem,
        native=pixels.native,
    )


def _variant(header: Header, name: str) -> str:
    text = header.text(name)
    return text if not text or name in TEXTS else _spelled(text)


@lru_cache(4096)
def _spelled(text: str) -> str:
    """Return numbers and times in one spelling for each: 2.46 and 2.460, 1 and 01 are the same."""
    try:
        return "\\".join(str((Decimal(part) + 0).normalize()) for part in text.split("\\"))
    except ArithmeticError:  # none, or none to compute with
        return text


def _count(number: float) -> int:
    return int(number) if math.isfinite(number) else 0


def _plane(header: Header) -> Affine | None:
    tags = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    numbers = [header.numbers(name) for name in tags]
    if [len(values) for values in numbers] != [*tags.values()] or not math.isfinite(sum(map(sum, numbers))):
        return None
    return slice_plane(*numbers)
