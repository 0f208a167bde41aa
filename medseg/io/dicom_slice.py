"""One DICOM file with one slice: what its header says, what forbids to read it, and its pixels."""

from __future__ import annotations

import logging
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import SeriesRefused, UnreadableFile
from medseg.io.dicom_geometry import Problem, slice_plane
from medseg.io.files import reading
from medseg.volume import Affine, Array

if TYPE_CHECKING:
    from pydicom import Dataset

VARIANTS = (
    "ImageType",
    "InversionTime",
    "EchoTime",
    "TriggerTime",
    "DiffusionBValue",
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
)
"""What may tell apart several stacks in one series."""

HEADER_TAGS = (
    *("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "SeriesDescription", *VARIANTS),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    *("Rows", "Columns", "NumberOfFrames", "SharedFunctionalGroupsSequence"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "HighBit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
)

LARGEST_NUMBER = 1e12
"""No length, count or slope reaches it, and no computation with smaller ones overflows."""

CODECS = "python-gdcm (JPEG, JPEG-LS, JPEG 2000) or pylibjpeg with pylibjpeg-openjpeg (JPEG 2000)"

REFUSALS = {
    "not_an_image": "The files hold no scan but a segmentation, contours, a dose, a report or the like.",
    "multi_frame": "A file holds several frames (enhanced DICOM); only files of one slice each can be read.",
    "mosaic": "Each file is a Siemens mosaic, many slices tiled into one picture. Convert the series to NIfTI first.",
    "color": "Expected gray values (MONOCHROME2), found a color picture. Pass the scan it was made from.",
    "monochrome1": "Expected gray values that grow brighter (MONOCHROME2), found inverted ones (MONOCHROME1).",
    "bit_layout": "HighBit is not BitsStored - 1, so it is unclear which bits are the gray value.",
    "rescale": "Expected one RescaleSlope and RescaleIntercept to make real values, found a table or no numbers.",
    "no_geometry": "A slice does not say where it lies: it needs ImagePositionPatient, PixelSpacing, and an "
    "ImageOrientationPatient of two perpendicular unit vectors. Export the original series.",
}
"""Why a file cannot be read, the most telling reason first."""


@dataclass(frozen=True, eq=False)
class Slice:
    """The header of one file; `problem` says what forbids to read it. What it does not state is blank or NaN.

    `shape` is (columns, rows). `plane`, if known, takes (column, row, 0) of a pixel to RAS+ mm. `slope` and `intercept`
    make real values of the stored ones.
    """

    path: Path
    sop_instance_uid: str
    series_uid: str
    frame_of_reference_uid: str
    modality: str
    description: str
    is_localizer: bool
    variants: tuple[str, ...]
    shape: tuple[int, int]
    plane: Affine | None
    thickness_mm: float
    slope: float
    intercept: float
    problem: Problem | None


def read_header(path: Path) -> Slice | None:
    """Return the header of a DICOM file, its pixels left unread; None for DICOMDIR and for files that are not DICOM.

    Raises UnreadableFile where the file is DICOM but its header is cut off.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import MediaStorageDirectoryStorage

    with parsing(path):
        try:
            data = dcmread(path, stop_before_pixels=True, specific_tags=[*HEADER_TAGS])
        except InvalidDicomError:
            return None
        if data.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
        if "SeriesInstanceUID" not in data and "Rows" not in data:
            raise UnreadableFile("A DICOM file ends before it names its series. Copy or export it again.", path=path)
        return _slice(path, data)


def read_pixels(part: Slice) -> Array:
    """Return the stored values (rows, columns), unused bits cleared and the sign extended, before any rescaling.

    Raises SeriesRefused where a decoder is not installed, UnreadableFile where pixels are missing or damaged.
    """
    from pydicom import dcmread
    from pydicom.pixels.utils import pixel_array

    with parsing(part.path):
        data = dcmread(BytesIO(part.path.read_bytes()), force=True)
        syntax = data.file_meta.TransferSyntaxUID
        if not _has_decoder(syntax):
            raise SeriesRefused(
                f"The pixels are compressed ({syntax.name}) and no installed package decodes that. Install {CODECS}.",
                path=part.path,
                reason="compressed_no_codec",
            )
        pixels: Array = pixel_array(data, raw=True)
        return pixels


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what pydicom raises into UnreadableFile, and keep it silent."""
    try:
        with reading(path), silence():
            yield
    except damage() as error:
        raise UnreadableFile("A DICOM file is cut short or damaged. Copy or export it again.", path=path) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep the warnings and logs of the DICOM libraries from quoting headers."""
    log = logging.getLogger("pydicom")
    nothing = logging.Filter("no such logger")
    log.addFilter(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeFilter(nothing)


def damage() -> tuple[type[Exception], ...]:
    """Return what pydicom and its decoders raise, besides OSError and the like, for files that break the standard."""
    from pydicom.errors import BytesLengthException

    usual = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, struct.error)
    return (*usual, BytesLengthException)


def _has_decoder(syntax: str) -> bool:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _slice(path: Path, data: Dataset) -> Slice:
    thicknesses = (_number(data, name) for name in ("SpacingBetweenSlices", "SliceThickness"))
    plane = _plane(data)
    return Slice(
        path=path,
        sop_instance_uid=_text(data, "SOPInstanceUID"),
        series_uid=_text(data, "SeriesInstanceUID"),
        frame_of_reference_uid=_text(data, "FrameOfReferenceUID"),
        modality=_text(data, "Modality"),
        description=_text(data, "SeriesDescription"),
        is_localizer="LOCALIZER" in _text(data, "ImageType").split("\\"),
        variants=tuple(_text(data, name) for name in VARIANTS),
        shape=(int(np.nan_to_num(_number(data, "Columns"))), int(np.nan_to_num(_number(data, "Rows")))),
        plane=plane,
        thickness_mm=next((length for length in thicknesses if length > 0), math.nan),
        slope=_number(data, "RescaleSlope", blank=1.0),
        intercept=_number(data, "RescaleIntercept", blank=0.0),
        problem=_problem(data, placed=plane is not None),
    )


def _plane(data: Dataset) -> Affine | None:
    tags = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    numbers = [_numbers(data, name) for name in tags]
    if [values.size for values in numbers] != [*tags.values()] or not np.isfinite(np.concatenate(numbers)).all():
        return None
    return slice_plane(*numbers)


def _problem(data: Dataset, *, placed: bool) -> Problem | None:
    color, bits = _text(data, "PhotometricInterpretation"), _number(data, "BitsStored")
    slope, intercept = _number(data, "RescaleSlope", blank=1), _number(data, "RescaleIntercept", blank=0)
    found = {
        "not_an_image": not (_number(data, "Rows") >= 1 and _number(data, "Columns") >= 1)
        or _text(data, "Modality") in {"SEG", "RTDOSE"},
        "multi_frame": _number(data, "NumberOfFrames", blank=1) != 1 or "SharedFunctionalGroupsSequence" in data,
        "mosaic": "MOSAIC" in _text(data, "ImageType").split("\\"),
        "color": not color.startswith("MONOCHROME") or _number(data, "SamplesPerPixel", blank=1) != 1,
        "monochrome1": color == "MONOCHROME1",
        "bit_layout": _number(data, "HighBit") != bits - 1,
        "rescale": "ModalityLUTSequence" in data or slope == 0 or not math.isfinite(slope + intercept),
        "no_geometry": not placed,
    }
    reason = next((reason for reason, is_so in found.items() if is_so), None)
    return Problem(reason, REFUSALS[reason]) if reason else None


def _value(data: Dataset, name: str) -> Any:
    """Return what a tag holds: None or "" where it is blank, "?" where it cannot be read."""
    try:
        return data.get(name)
    except damage():
        return "?"


def _text(data: Dataset, name: str) -> str:
    value = _value(data, name)
    if value is None or isinstance(value, str):
        return str(value or "")
    return "\\".join(map(str, np.atleast_1d(value)))


def _numbers(data: Dataset, name: str) -> NDArray[np.float64]:
    """Return the numbers of a tag; none where it is blank, NaN for what is no number or none to compute with."""
    value = _value(data, name)
    try:
        numbers = np.array([] if value in (None, "") else value, dtype=np.float64).ravel()
    except (ValueError, TypeError):
        return np.array([math.nan])
    return np.where(np.abs(numbers) < LARGEST_NUMBER, numbers, math.nan)


def _number(data: Dataset, name: str, *, blank: float = math.nan) -> float:
    numbers = _numbers(data, name)
    if not numbers.size:
        return blank
    return float(numbers[0]) if numbers.size == 1 else math.nan
