"""The pixels of DICOM files: straight from where they lie where they are not compressed, else through pydicom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from medseg.errors import SeriesRefused, UnreadableFile
from medseg.io.dicom_header import Header, parsing
from medseg.volume import Array

if TYPE_CHECKING:
    from pydicom import Dataset

CODECS = 'the decoders with: pip install "medseg[codecs]"'

PIXEL_DATA = b"\xe0\x7f\x10\x00"
"""The tag of PixelData (7FE0,0010) in little-endian order."""


class Native(NamedTuple):
    """Where the element with uncompressed pixels starts in its file, the bytes before its values, and their layout."""

    start: int
    head: bytes
    shape: tuple[int, int]
    dtype: str
    unused_bits: int


def locate(file: BinaryIO, data: Dataset, header: Header) -> Native | None:
    """Return where the pixels of a file begin that was parsed up to them; None where they need pydicom.

    Those are compressed, big-endian, color or cut short, and layouts that the standard does not know.
    """
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = data.file_meta.get("TransferSyntaxUID")
    start, head = file.tell(), file.read(12 if syntax == ExplicitVRLittleEndian else 8)
    names = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
    numbers = [header.number(name) for name in names]
    if syntax not in {ExplicitVRLittleEndian, ImplicitVRLittleEndian} or head[:4] != PIXEL_DATA:
        return None
    if not all(number.is_integer() for number in numbers):
        return None
    rows, columns, allocated, stored, signed = map(int, numbers)
    if allocated not in {8, 16, 32} or not 1 <= stored <= allocated or signed not in {0, 1}:
        return None
    length = int.from_bytes(head[-4:], "little")
    wanted = rows * columns * header.number("NumberOfFrames", blank=1) * header.number("SamplesPerPixel", blank=1)
    if length == 0xFFFFFFFF or not 0 < wanted * allocated / 8 <= length:
        return None
    return Native(start, head, (rows, columns), f"<{'ui'[signed]}{allocated // 8}", allocated - stored)


def read_pixels(path: Path, frames: Sequence[int] = (0,), native: Native | None = None) -> list[Array]:
    """Return the stored values (rows, columns) of frames of a file, unused bits cleared and the sign extended.

    `native` is what `locate` found, which saves parsing the file again. Nothing is rescaled. The values of MONOCHROME1
    are left as they are, too: it asks to show them inverted, and says nothing about what they mean
    (PS3.3 C.7.6.3.1.2).
    Raises SeriesRefused where a decoder is not installed, UnreadableFile where pixels are missing or damaged.
    """
    with parsing(path):
        return [*(_decoded(path, frames) if native is None else _straight(path, frames, native))]


def _straight(path: Path, frames: Sequence[int], native: Native) -> Iterator[Array]:
    dtype = np.dtype(native.dtype)
    size = native.shape[0] * native.shape[1] * dtype.itemsize
    with path.open("rb", buffering=0) as file:
        file.seek(native.start)
        if file.read(len(native.head)) != native.head:
            raise UnreadableFile("A DICOM file has changed while it was read. Read it again.", path=path)
        for frame in frames:
            file.seek(native.start + len(native.head) + frame * size)
            values = np.frombuffer(file.read(size), dtype).reshape(native.shape)
            yield values << native.unused_bits >> native.unused_bits if native.unused_bits else values


def _decoded(path: Path, frames: Sequence[int]) -> Iterator[Array]:
    from pydicom import dcmread
    from pydicom.pixels.utils import iter_pixels

    data = dcmread(BytesIO(path.read_bytes()), force=True)
    syntax = data.file_meta.TransferSyntaxUID
    if not has_decoder(syntax):
        raise SeriesRefused(
            f"The pixels are compressed ({syntax.name}) and no installed package decodes that. Install {CODECS}.",
            path=path,
            reason="compressed_no_codec",
        )
    yield from iter_pixels(data, raw=True, indices=[*frames])


def has_decoder(syntax: str) -> bool:
    """Return whether an installed package decodes a transfer syntax."""
    from pydicom.pixels.decoders.base import get_decoder

    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False
