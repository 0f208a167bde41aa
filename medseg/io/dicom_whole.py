"""Whether the pixels of a DICOM file are there to their end, found out without reading them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Literal

from medseg.io.dicom_pixels import Native
from medseg.io.dicom_refusals import Pixels

if TYPE_CHECKING:
    from pydicom import Dataset

PIXEL_DATA, FLOATS = 0x7FE00010, frozenset({0x7FE00008, 0x7FE00009})

ITEM, DELIMITER = 0xFFFEE000, 0xFFFEE0DD
"""What the parts of compressed pixels begin with, and what follows the last (PS3.5 A.4)."""

UNDEFINED = 0xFFFFFFFF


def pixels_of(file: BinaryIO, start: int, data: Dataset, frames: int, native: Native | None) -> tuple[Pixels, bool]:
    """Return what a file has for pixels, and whether all of them are there.

    `start` is where parsing `file` stopped. Of a deflated file nothing is known but that it was inflated up to there.
    """
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if data.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return "decoded", True
    order: Literal["little", "big"] = "little" if data.original_encoding[1] else "big"
    size = os.fstat(file.fileno()).st_size
    file.seek(start)
    head = file.read(8)
    if head[4:6].isalpha():  # an explicit VR; as an implicit length it would be odd, which lengths are not
        head += file.read(4)
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)
    if tag in FLOATS:
        return "float", True
    if tag != PIXEL_DATA:
        return "none", True
    length = int.from_bytes(head[-4:], order)
    if native is not None:
        rows, columns = native.shape
        return "stored", file.tell() + frames * rows * columns * int(native.dtype[-1]) <= size
    if length != UNDEFINED:
        return "decoded", file.tell() + length <= size
    return "decoded", _parts(file, size) >= frames


def _parts(file: BinaryIO, size: int) -> int:
    """Return how many whole parts compressed pixels have behind their table of offsets; -1 where one is cut."""
    count = -1
    while len(head := file.read(8)) == 8:
        tag = int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")
        end = file.tell() + int.from_bytes(head[4:], "little")
        if tag != ITEM:
            break
        if end > size:
            return -1
        count += 1
        file.seek(end)
    return count
