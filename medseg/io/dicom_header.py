"""The header of one DICOM slice as texts and numbers, wherever the file keeps them: at the top, or in frame groups.

pydicom parses the file; what its elements hold is converted here, since that takes half the time of reading a header
and few elements are needed. What cannot be converted is blank or NaN: it is judged, not trusted.
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import UnreadableFile
from medseg.io.files import reading

if TYPE_CHECKING:
    from pydicom import Dataset

LARGEST_NUMBER = 1e12
"""No length, count or slope reaches it, and no computation with smaller ones overflows."""

FRAME_GROUPS = {
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {name: name for name in ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")},
    "PixelValueTransformationSequence": {name: name for name in ("RescaleSlope", "RescaleIntercept")},
    "FrameContentSequence": {
        "TemporalPositionIndex": "TemporalPositionIdentifier",
        "FrameAcquisitionNumber": "AcquisitionNumber",
        "FrameAcquisitionDateTime": "AcquisitionDateTime",
        "NominalPercentageOfCardiacPhase": "NominalPercentageOfCardiacPhase",
        "StackID": "StackID",
    },
    "MRImageFrameTypeSequence": {"FrameType": "ImageType"},
    "CTImageFrameTypeSequence": {"FrameType": "ImageType"},
    "PETFrameTypeSequence": {"FrameType": "ImageType"},
    "MREchoSequence": {"EffectiveEchoTime": "EchoTime"},
    "MRModifierSequence": {"InversionTimes": "InversionTime"},
    "MRDiffusionSequence": {"DiffusionBValue": "DiffusionBValue"},
    "DiffusionGradientDirectionSequence": {"DiffusionGradientOrientation": "DiffusionGradientOrientation"},
    "ContrastBolusUsageSequence": {"ContrastBolusAgentAdministered": "ContrastBolusAgent"},
    "CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": "TriggerTime"},
}
"""Functional groups of enhanced objects, and the classic names of what they hold (PS3.3 C.7.6.16.2, C.8.13, C.8.15)."""

NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
"""Binary value representations, and their codes in `struct`."""


@dataclass(frozen=True)
class Header:
    """The elements of one slice by tag. `frame_is_described` is False for frames without functional groups."""

    elements: Mapping[int, Any]
    frame_is_described: bool = True

    def has(self, name: str) -> bool:
        """Return whether the element is there, blank or not."""
        return _tag(name)[0] in self.elements

    def text(self, name: str) -> str:
        """Return an element as text, several values with a backslash between them; "" where it is blank or absent."""
        return "\\".join(map(str, self.values(*_tag(name))))

    def numbers(self, name: str) -> list[float]:
        """Return the numbers of an element; none where it is blank, NaN for what is none or none to compute with."""
        return [number_of(value) for value in self.values(*_tag(name))]

    def number(self, name: str, *, blank: float = math.nan) -> float:
        """Return the number of an element, `blank` where there is none, NaN where there are several."""
        numbers = self.numbers(name)
        if not numbers:
            return blank
        return numbers[0] if len(numbers) == 1 else math.nan

    def raw(self, tag: int) -> bytes:
        """Return the bytes of an element that is kept as it is; none where it is absent or something else."""
        element = self.elements.get(tag)
        return element.value if element is not None and isinstance(element.value, bytes) else b""

    def values(self, tag: int, usual: str) -> list[Any]:
        """Return the values of an element; `usual` is its value representation where the file states none."""
        element = self.elements.get(tag)
        value = None if element is None else element.value
        if element is not None and isinstance(value, bytes):
            kind = element.VR if element.VR not in {None, "UN"} else usual
            if kind in NUMBERS:
                return _unpacked(value, NUMBERS[kind], getattr(element, "is_little_endian", True))
            value = value.decode("latin-1").strip(" \0\t\r\n")
        if value is None or (isinstance(value, str) and not value):
            return []
        if isinstance(value, str):
            return [part.strip() for part in value.split("\\")]
        return [*value] if isinstance(value, Iterable) else [value]


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what pydicom raises into UnreadableFile, and keep it silent."""
    try:
        with reading(path), silence():
            yield
    except MemoryError as error:
        raise UnreadableFile(
            "A DICOM file asks for more memory than there is: it is damaged, or larger than this machine can read.",
            path=path,
            reason="too_large",
        ) from error
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


def frame_headers(data: Dataset) -> list[Header]:
    """Return a header for each frame of a file: that of the file, with the frame's functional groups laid over it.

    Source: PS3.3 C.7.6.16 (multi-frame functional groups).
    """
    top = {int(tag): data.get_item(tag) for tag in data.keys()}  # noqa: SIM118 - iterating a Dataset converts it
    frames = data.get("PerFrameFunctionalGroupsSequence") or ()
    count = Header(top).number("NumberOfFrames", blank=1) or 1  # some write 0 for a file without frames
    if not frames or len(frames) != count:
        return [Header(top, frame_is_described=not frames and count == 1)]
    shared = [element for item in data.get("SharedFunctionalGroupsSequence") or () for element in _grouped(item)]
    return [Header(top | dict(shared) | dict(_grouped(item))) for item in frames]


def _grouped(item: Dataset) -> Iterator[tuple[int, Any]]:
    """Yield what the known functional groups of an item hold, by the tags of a classic header."""
    for group, names in FRAME_GROUPS.items():
        for inner in item.get(group) or ():
            for name, classic in names.items():
                if name in inner:
                    yield _tag(classic)[0], inner.get_item(_tag(name)[0])
            if group == "MRDiffusionSequence":
                yield from _grouped(inner)


@cache
def _tag(name: str) -> tuple[int, str]:
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(name) or 0
    return tag, dictionary_VR(tag)


def number_of(value: Any) -> float:
    """Return a value as a number, NaN for what is none or none to compute with."""
    try:
        number = float(value)
    except (ValueError, TypeError):
        return math.nan
    return number if abs(number) < LARGEST_NUMBER else math.nan


def _unpacked(value: bytes, code: str, little_endian: bool) -> list[Any]:
    size = struct.calcsize(code)
    count = len(value) // size
    return [*struct.unpack(f"{'<' if little_endian else '>'}{count}{code}", value[: count * size])]
