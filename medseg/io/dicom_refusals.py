"""What forbids to read a slice, by its header alone."""

from __future__ import annotations

import math
from typing import Literal

from medseg.io.dicom_geometry import Problem
from medseg.io.dicom_header import Header
from medseg.io.dicom_mosaic import is_mosaic

Pixels = Literal["none", "stored", "decoded", "float"]
"""What a file has for pixels: none, integers that are stored as they are or that need a decoder, or other numbers."""

NO_IMAGES = frozenset({"SEG", "RTDOSE"})
"""Modalities whose objects have pixels and are no scan."""

REFUSALS = {
    "no_pixels": "A file is an image and has no pixels: it is cut short, or somebody took them out. Copy or export it "
    "again.",
    "not_an_image": "The files hold no scan but a segmentation, contours, a dose, a report or the like.",
    "picture": "The files are radiographs, ultrasound, screenshots or other pictures, and do not say where they lie in "
    "the patient.",
    "multi_frame": "A file holds several frames and does not say where each of them lies. Export the original series.",
    "mosaic": "Each file is a mosaic, many slices tiled into one picture, as scanners of Siemens and United Imaging "
    "write them. Convert the series to NIfTI first.",
    "color": "Expected gray values (MONOCHROME2), found a color picture. Pass the scan it was made from.",
    "missing_attribute": "The header does not state {}, without which the pixels cannot be read. "
    "Export the original series.",
    "bit_layout": "It is unclear which bits are the gray value: {}. Export the original series.",
    "rescale": "Expected one RescaleSlope and RescaleIntercept to make real values, found a table or no numbers.",
    "no_geometry": "A slice does not say where it lies: {}. Export the original series.",
}
"""Why a file cannot be read, the most telling reason first; what was found goes between the braces."""

IMAGES = "1.2.840.10008.5.1.4.1.1."
"""How the SOP classes of images begin (PS3.4 B.5)."""

SCAN_CLASSES = frozenset({"2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "128", "128.1", "130", ""})
"""How those of CT, MR and PET go on; some images leave it blank."""

PICTURES = ("1.", "3.1.", "6.1.", "7.", "12.1.", "12.2.", "77.1.", "481.1.")
"""How those of radiographs, ultrasound, secondary captures, angiography, photographs and RT images go on."""

LAYOUT = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
"""What it takes to read pixels that are stored as they are."""

DECODED = ("SamplesPerPixel", "PhotometricInterpretation")
"""What a decoder wants to know, too. Else it only tells gray values from colors, and one of the two is enough."""

GEOMETRY = {
    "ImagePositionPatient": (3, "three numbers"),
    "ImageOrientationPatient": (6, "two perpendicular unit vectors"),
    "PixelSpacing": (2, "two positive lengths"),
}
"""What places a slice: how many numbers, and what they are."""


def slice_problem(header: Header, pixels: Pixels, *, placed: bool) -> Problem | None:
    """Return the most telling reason why a slice cannot be read, or None.

    `placed` says whether its plane is known.
    """
    color = header.text("PhotometricInterpretation")
    slope, intercept = header.number("RescaleSlope", blank=1), header.number("RescaleIntercept", blank=0)
    found = {
        "no_pixels": pixels == "none" and _is_scan(header),
        "not_an_image": pixels == "none" or not _has_size(header) or header.text("Modality") in NO_IMAGES,
        "picture": not placed and _is_picture(header),
        "multi_frame": not header.frame_is_described,
        "mosaic": is_mosaic(header),
        "color": (color and not color.startswith("MONOCHROME"))
        or header.number("SamplesPerPixel", blank=1) != 1
        or header.has("RedPaletteColorLookupTableDescriptor"),
        "missing_attribute": "" if pixels == "float" else " and ".join(_missing(header, pixels == "decoded")),
        "bit_layout": _layout_fault(header, pixels),
        "rescale": header.has("ModalityLUTSequence") or slope == 0 or not math.isfinite(slope + intercept),
        "no_geometry": "" if placed else _place_fault(header),
    }
    reason = next((reason for reason, is_so in found.items() if is_so), None)
    return Problem(reason, REFUSALS[reason].format(found[reason])) if reason else None


def _is_scan(header: Header) -> bool:
    sop_class = header.text("SOPClassUID").removeprefix(IMAGES)
    return header.text("Modality") in {"CT", "MR", "PT"} and sop_class in SCAN_CLASSES


def _is_picture(header: Header) -> bool:
    sop_class = header.text("SOPClassUID")
    return sop_class.startswith(IMAGES) and f"{sop_class.removeprefix(IMAGES)}.".startswith(PICTURES)


def _has_size(header: Header) -> bool:
    sizes = [header.numbers(name) for name in ("Rows", "Columns")]
    return any(sizes) and all(size[0] >= 1 for size in sizes if size)


def _missing(header: Header, decoded: bool) -> list[str]:
    """Return the names of elements that it takes to read the pixels and that the header lacks."""
    names = [name for name in LAYOUT if not header.numbers(name)]
    unstated = [name for name in DECODED if not header.text(name)]
    return [*names, *(unstated if decoded or len(unstated) == len(DECODED) else ())]


def _layout_fault(header: Header, pixels: Pixels) -> str:
    allocated, stored = header.number("BitsAllocated"), header.number("BitsStored")
    if pixels == "float":
        return "the pixels are floating-point numbers"
    if header.number("HighBit", blank=stored - 1) != stored - 1:
        return "HighBit is not BitsStored - 1"
    if allocated not in {8, 16, 32} or not 1 <= stored <= allocated:
        return "BitsAllocated is not 8, 16 or 32, or BitsStored does not fit into it"
    return "" if header.number("PixelRepresentation") in {0, 1} else "PixelRepresentation is neither 0 nor 1"


def _place_fault(header: Header) -> str:
    """Return which elements are missing, or else which is wrong, of a slice that has no plane."""
    numbers = {name: header.numbers(name) for name in GEOMETRY}
    missing = [f"{name} is missing" for name in GEOMETRY if not numbers[name]]
    wrong = [
        f"{name} is not {what}"
        for name, (count, what) in GEOMETRY.items()
        if len(numbers[name]) != count or not math.isfinite(sum(numbers[name]))
    ]
    if not missing and not wrong:
        name = "ImageOrientationPatient" if min(numbers["PixelSpacing"]) > 0 else "PixelSpacing"
        wrong = [f"{name} is not {GEOMETRY[name][1]}"]
    return " and ".join(missing or wrong)
