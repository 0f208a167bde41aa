"""What a DICOM object that belongs to a series says of it: patient, study, frame of reference, instances.

Only what the standard requires of every object is taken over; descriptions, physicians, ages and comments are not.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError, InputError, OutputError
from medseg.io.dicom_file import read_data
from medseg.io.dicom_geometry import LPS_TO_RAS
from medseg.io.dicom_header import parsing, silence
from medseg.io.dicom_series import Series, choose
from medseg.io.dicom_slice import Slice
from medseg.io.files import check_place
from medseg.labels import Label
from medseg.volume import Grid

if TYPE_CHECKING:
    from pydicom import Dataset

Source = str | os.PathLike[str] | Series
"""The series that labels belong to: its folder, or itself as `find_series` found it."""

PACKAGE = str(Path(__file__).parents[1])

OWN_SCHEME = "99MEDSEG"
"""The coding scheme of labels without a SNOMED CT code; see `code_of`."""

STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management (retired), by which RT objects still refer to their study."""

UTF8 = "ISO_IR 192"
NAME_LENGTH = 64
"""How many characters a name may have (VR LO, PS3.5 6.2)."""

PATIENT_AND_STUDY = {
    "PatientName": ".*",
    "PatientID": ".*",
    "PatientBirthDate": r"\d{8}",
    "PatientSex": "[MFO]",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2,6}(\.\d{1,6})?",
    "ReferringPhysicianName": ".*",
    "StudyID": ".*",
    "AccessionNumber": ".*",
}
"""What every object repeats (type 2: may be blank), and how it must look, else it is left blank."""

IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
"""Without these, nothing can refer to a file."""

OTHER = (
    *("SpecificCharacterSet", "Modality", "Rows", "Columns", "SliceThickness"),
    *("NumberOfFrames", "PerFrameFunctionalGroupsSequence"),
)


def located(source: Source) -> tuple[Series, Grid]:
    """Return the series and its grid; of slices with irregular steps the regular one that they are interpolated onto.

    Raises what reading the series raises for headers.
    """
    if not isinstance(source, Series):
        return choose(source, repaired=True)
    grid = source.grid or source.regular_grid
    if grid is None:
        raise source.refusal or GeometryError("The series has no grid.")
    return source, grid


def read_object(path: Path, modality: str, content: str, *, pixels: bool = True) -> Dataset:
    """Return the object in a file, a "SEG" or "RTSTRUCT" with the element `content`; call it within `parsing`.

    Raises UnreadableFile for files that are not DICOM, InputError (`not_seg`, `not_rtstruct`) for other objects.
    """
    data = read_data(path, pixels=pixels)
    if data.get("Modality") != modality or content not in data:
        name = {"SEG": "a DICOM SEG", "RTSTRUCT": "an RT Structure Set"}[modality]
        raise InputError(f"Expected {name}; this is another object.", path=path, reason=f"not_{modality.lower()}")
    return data


def headers(slices: Sequence[Slice]) -> list[Dataset]:
    """Return for each slice what an object that refers to it repeats, in clean form, and its geometry.

    NumberOfFrames is there for the frames of enhanced files alone.
    Raises OutputError (`unreferable_source`) where a file lacks an identifier, so that nothing can refer to it.
    """
    found = []
    step_mm = _step_mm(slices)
    files: dict[Path, Dataset] = {}
    for part in slices:
        with parsing(part.path):
            if part.path not in files:
                tags = [*IDENTITY, *PATIENT_AND_STUDY, *OTHER]
                files[part.path] = read_data(part.path, tags)
            header = _clean(files[part.path], part, step_mm)
        missing = [name for name in IDENTITY if not header.get(name)]
        if missing:
            raise unreferable(f"A file of the source does not state its {', '.join(missing)}", part.path)
        found.append(header)
    return found


def lps(points: NDArray[np.float64], plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the positions (n, 3) in DICOM's LPS mm of points (n, 2) of a slice: columns and rows, in pixels."""
    to_lps = LPS_TO_RAS @ plane
    return np.asarray(points @ to_lps[:3, :2].T + to_lps[:3, 3])


def item(**fields: object) -> Dataset:
    """Return a Dataset with these elements."""
    from pydicom import Dataset

    made = Dataset()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def named(text: str) -> str:
    """Return a text as DICOM takes a name: at most 64 characters, without backslashes and control characters."""
    return "".join("/" if letter == "\\" else letter for letter in text if letter.isprintable())[:NAME_LENGTH]


def equipment() -> dict[str, str]:
    """Return what medseg says of itself in the objects that it writes."""
    from medseg import __version__

    return {
        "Manufacturer": "medseg",
        "ManufacturerModelName": "medseg",
        "DeviceSerialNumber": "1",
        "SoftwareVersions": __version__,
    }


def other_frame_of_reference(stated: str, series: Series, path: Path, images: Callable[[], set[str]]) -> bool:
    """Return whether an object states another frame of reference than a series whose very slices it refers to.

    Some programs write one of their own making. `images` gives the SOPInstanceUIDs that the object was drawn on.
    Raises GeometryError where the frames differ and any of them is not a slice of the series, or none is named.
    """
    if not stated or not series.frame_of_reference_uid or stated == series.frame_of_reference_uid:
        return False
    named = images()
    if named and named <= {part.sop_instance_uid for part in series.slices}:
        return True
    raise frame_of_reference_error(path)


def frame_of_reference_error(path: Path) -> GeometryError:
    """Return the error for an object whose positions mean something else in the source."""
    return GeometryError(
        "The file was made in another frame of reference than the source, and not everything in it lies on a slice of "
        "the source that it names, so its positions mean something else there. Pass the series that it was made for.",
        path=path,
        reason="frame_of_reference",
    )


OTHER_FRAME = (
    "The file states another frame of reference than the source, but refers to the very slices of the source, so it is "
    "read as drawn on them."
)
"""What is told of such an object."""


def instances(items: Iterable[Dataset]) -> set[str]:
    """Return every ReferencedSOPInstanceUID of images in items, at any depth."""
    found: set[str] = set()
    for one in items:
        for element in one:
            if element.VR == "SQ" and element.value:
                found |= instances(element.value)
        if one.get("ReferencedSOPInstanceUID") and one.get("ReferencedSOPClassUID") != STUDY_CLASS:
            found.add(str(one.ReferencedSOPInstanceUID))
    return found


def whole(data: Dataset, name: str) -> int | None:
    """Return the whole number of an element; None where it is blank, absent or something else."""
    try:
        value = float(data.get(name))
        return int(value) if value.is_integer() else None
    except (ValueError, TypeError, OverflowError):
        return None


@contextmanager
def referring(path: Path, slices: Sequence[Slice]) -> Iterator[None]:
    """Turn what the DICOM libraries raise for values that they do not take into OutputError, and keep them silent.

    What our own code raises is a bug of ours and stays what it is. Raises what `check_place` raises, for a `path` that
    is one of the slices that the object refers to, too.
    """
    from pydicom.errors import BytesLengthException

    check_place(path, {part.path for part in slices})
    log = logging.getLogger("highdicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with silence():
            yield
    except (ValueError, LookupError, BytesLengthException) as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        if innermost.filename.startswith(PACKAGE):
            raise
        raise unreferable("The headers of the source break the DICOM standard", path) from error
    finally:
        log.setLevel(level)


def code_of(label: Label) -> tuple[str, str, str]:
    """Return value, scheme and meaning of the code for a label.

    A label without a SNOMED CT code gets one of our own: the start of a hash of its name in lower case, so that labels
    of one name have one code everywhere.
    """
    if label.snomed is not None:
        return label.snomed.value, "SCT", named(label.snomed.meaning)
    return hashlib.sha256(label.name.casefold().encode()).hexdigest()[:16], OWN_SCHEME, named(label.name)


def color_of(label: Label) -> tuple[int, int, int]:
    """Return red, green and blue from 0 to 255."""
    red, green, blue = bytes.fromhex(label.color[1:])
    return red, green, blue


def now() -> tuple[str, str]:
    """Return date and time as DICOM writes them."""
    moment = datetime.datetime.now()
    return moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")


def _step_mm(slices: Sequence[Slice]) -> float:
    """Return the usual distance of two slices; of a single one, how thick it is."""
    planes = np.array([part.plane for part in slices if part.plane is not None])
    steps_mm = np.diff(planes[:, :3, 3] @ planes[0, :3, 2])
    return float(np.median(np.abs(steps_mm))) if steps_mm.size else slices[0].thickness_mm


def _clean(data: Dataset, part: Slice, step_mm: float) -> Dataset:
    from pydicom import Dataset
    from pydicom.valuerep import DS

    header = Dataset()
    header.SpecificCharacterSet = UTF8
    for name in (*IDENTITY, "Modality"):
        setattr(header, name, str(data.get(name) or ""))
    # Blank, as it may be (type 2): in scans it is free text.
    header.PositionReferenceIndicator = ""
    for name, pattern in PATIENT_AND_STUDY.items():
        text = str(data.get(name) or "")
        setattr(header, name, text if re.fullmatch(pattern, text) else "")
    header.Rows, header.Columns = data.Rows, data.Columns
    if "PerFrameFunctionalGroupsSequence" in data:
        header.NumberOfFrames = data.NumberOfFrames
    # A slice of a series that was accepted or repaired has a plane.
    plane = LPS_TO_RAS @ (np.eye(4) if part.plane is None else part.plane)
    column_step, row_step = np.linalg.norm(plane[:3, :2], axis=0)
    directions = plane[:3, :2] / (column_step, row_step)
    thickness = float(data.get("SliceThickness") or 0)
    for name, values in {
        "ImagePositionPatient": plane[:3, 3],
        "ImageOrientationPatient": directions.T.ravel(),
        "PixelSpacing": (row_step, column_step),
        "SliceThickness": [thickness if thickness > 0 else step_mm],
    }.items():
        numbers = [DS(float(value), auto_format=True) for value in values]
        setattr(header, name, numbers if len(numbers) > 1 else numbers[0])
    return header


def unreferable(what: str, path: Path) -> OutputError:
    """Return the error for a source that no DICOM object can refer to."""
    return OutputError(
        f"{what}, so no DICOM object can refer to it. Save the labels as NIfTI, or export the series again.",
        path=path,
        reason="unreferable_source",
    )
