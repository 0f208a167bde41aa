"""Mosaics: pictures into which a scanner tiled the slices of a volume, known by any of the signs that it left.

No sign is in all of them: exports and anonymizers rewrite ImageType, and drop private elements or move them to other
blocks. Sources: the private dictionary of pydicom, and dcm2niix for what Siemens and United Imaging write.
"""

from __future__ import annotations

import re

from medseg.io.dicom_header import Header, number_of

WORDS = frozenset({"MOSAIC", "VFRAME"})
"""What ImageType says of mosaics of Siemens, and of grids of United Imaging."""

BLOCKS = range(0x10, 0x18)
"""Private blocks that are looked into; scanners use the first ones (PS3.5 7.8)."""

COUNTS = {0x0019000A: ("SIEMENS MR HEADER", "US"), 0x00650050: ("IMAGE PRIVATE HEADER", "DS")}
"""How many slices the picture holds: NumberOfImagesInMosaic, and the images in a grid of United Imaging."""

TEXTS = {0x00210075: "SIEMENS MR SD", 0x00510016: "SIEMENS MR HEADER"}
"""Private copies of ImageType: of the XA scanners, and of those before."""

HEADERS = {0x00290010: "SIEMENS CSA HEADER", 0x00290020: "SIEMENS CSA HEADER"}
"""Siemens' private headers, of the image and of the series."""

FRAMES = {0x00650051: "IMAGE PRIVATE HEADER"}
"""The sequence in which United Imaging keeps the position of each slice."""

PRIVATE = (*COUNTS, *TEXTS, *HEADERS, *FRAMES)

TAGS = (
    *(tag | block << 8 for tag in PRIVATE for block in BLOCKS),
    *(group << 16 | block for group in sorted({tag >> 16 for tag in PRIVATE}) for block in BLOCKS),
)
"""Private elements to read, and those that name their creators."""

CSA_COUNT = re.compile(rb"NumberOfImagesInMosaic\0.{41}.{20}.{16}\s*(\d+)", re.DOTALL)
"""An entry of a CSA header: a name of 64 bytes, 20 bytes, and the first value as text behind 16 bytes."""

WIDEST_MM = 1000
"""No MR scanner images so much in both directions of a slice; the tiles of a mosaic are as large as slices are."""


def is_mosaic(header: Header) -> bool:
    """Return whether the picture holds the slices of a volume side by side."""
    if WORDS & {*header.text("ImageType").upper().split("\\")} or _is_too_wide(header):
        return True
    return any(_says_so(header, tag) for tag in header.elements if tag >> 16 & 1)


def _says_so(header: Header, tag: int) -> bool:
    """Return whether a private element says that the picture is a mosaic."""
    group, block = tag >> 16, tag >> 8 & 0xFF
    if block not in BLOCKS:
        return False
    sign, creator = tag & ~0xFF00, "\\".join(map(str, header.values(group << 16 | block, "LO"))).upper()

    def made_by(name: str) -> bool:
        return creator.startswith(name) or not creator  # which an anonymizer dropped

    if sign in COUNTS and made_by(COUNTS[sign][0]):
        return any(number_of(value) > 1 for value in header.values(tag, COUNTS[sign][1]))
    if sign in TEXTS and made_by(TEXTS[sign]):
        return bool(WORDS & {*re.split(r"\W+", "\\".join(map(str, header.values(tag, "LO"))).upper())})
    if sign in HEADERS and made_by(HEADERS[sign]):
        found = CSA_COUNT.search(header.raw(tag))
        return found is not None and number_of(found[1]) > 1
    return sign in FRAMES and made_by(FRAMES[sign]) and bool(header.values(tag, "SQ"))


def _is_too_wide(header: Header) -> bool:
    spacing_mm = header.numbers("PixelSpacing")
    if header.text("Modality") != "MR" or len(spacing_mm) != 2:
        return False
    sizes_mm = spacing_mm[0] * header.number("Rows"), spacing_mm[1] * header.number("Columns")
    return min(sizes_mm) >= WIDEST_MM
