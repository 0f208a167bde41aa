"""What forbids to read a slice, by its header alone."""

from __future__ import annotations

import math

from medseg.io.dicom_geometry import Problem
from medseg.io.dicom_header import Header

NO_IMAGES = frozenset({"SEG", "RTDOSE"})
"""Modalities whose objects have pixels and are no scan."""

REFUSALS = {
    "not_an_image": "The files hold no scan but a segmentation, contours, a dose, a report or the like.",
    "multi_frame": "A file holds several frames and does not say where each of them lies. Export the original series.",
    "mosaic": "Each file is a Siemens mosaic, many slices tiled into one picture. Convert the series to NIfTI first.",
    "color": "Expected gray values (MONOCHROME2), found a color picture. Pass the scan it was made from.",
    "bit_layout": "HighBit is not BitsStored - 1, so it is unclear which bits are the gray value.",
    "rescale": "Expected one RescaleSlope and RescaleIntercept to make real values, found a table or no numbers.",
    "no_geometry": "A slice does not say where it lies: it needs ImagePositionPatient, PixelSpacing, and an "
    "ImageOrientationPatient of two perpendicular unit vectors. Export the original series.",
}
"""Why a file cannot be read, the most telling reason first."""


def slice_problem(header: Header, *, placed: bool) -> Problem | None:
    """Return the most telling reason why a slice cannot be read; `placed` says whether its plane is known."""
    color, bits = header.text("PhotometricInterpretation"), header.number("BitsStored")
    slope, intercept = header.number("RescaleSlope", blank=1), header.number("RescaleIntercept", blank=0)
    found = {
        "not_an_image": not (header.number("Rows") >= 1 and header.number("Columns") >= 1)
        or header.text("Modality") in NO_IMAGES,
        "multi_frame": not header.frame_is_described,
        "mosaic": "MOSAIC" in header.text("ImageType").split("\\"),
        "color": not color.startswith("MONOCHROME") or header.number("SamplesPerPixel", blank=1) != 1,
        "bit_layout": header.number("HighBit") != bits - 1,
        "rescale": header.has("ModalityLUTSequence") or slope == 0 or not math.isfinite(slope + intercept),
        "no_geometry": not placed,
    }
    reason = next((reason for reason, is_so in found.items() if is_so), None)
    return Problem(reason, REFUSALS[reason]) if reason else None
