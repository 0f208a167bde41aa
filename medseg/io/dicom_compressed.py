"""Compressed pixels of DICOM files: who decodes them, whether they are what the header says, and their values."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from math import ceil
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from medseg.errors import InputError, UnreadableFile
from medseg.io.dicom_file import ITEM, LARGEST_PIXELS, UNCOMPRESSED
from medseg.io.dicom_geometry import Problem
from medseg.io.dicom_header import Header
from medseg.volume import Array

if TYPE_CHECKING:
    from pydicom import Dataset

CODECS = 'Install the decoders with: pip install "medseg[codecs]".'
TWELVE_BITS = "Install a decoder with: pip install pylibjpeg pylibjpeg-libjpeg (its license is the GPL 3)."

JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
RLE = "1.2.840.10008.1.2.5"

LARGEST_FRAME = 2**27
"""Pixels of a compressed frame: ten times more than any scanner makes, and little enough to decode."""

RLE_RATIO = 64
"""Two bytes of RLE become 128 at most (PS3.5 G.3.1)."""

SIZE_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG (SOF0 to SOF15) and of JPEG-LS (SOF55) behind which the size of the picture stands."""

UNKNOWN_SYNTAX = Problem(
    "transfer_syntax",
    "The file does not say how its pixels are encoded, or in a transfer syntax that is not known. "
    "Export the series in explicit VR little endian.",
)
TOO_LARGE = Problem(
    "too_large",
    "The header states pictures of more than 128 million pixels, or more than 8 GB of them in one compressed file. "
    "Export the series uncompressed if you trust it.",
)


class Picture(NamedTuple):
    """What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself; `bits` is 0 where JPEG 2000 does not tell."""

    rows: int
    columns: int
    bits: int


def compression_problem(syntax: str, stream: BinaryIO, header: Header) -> Problem | None:
    """Return why compressed pixels, of which `stream` is at the first item, cannot be decoded here; None if they can.

    `compressed_no_codec`: an installed package does not do that, and another one does; `compressed_unknown`: no
    package that pydicom knows does it.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    if syntax in {*UNCOMPRESSED, ""} or not UID(syntax).is_transfer_syntax:
        return UNKNOWN_SYNTAX
    name = UID(syntax).name
    pixels = header.number("Rows") * header.number("Columns")
    frames = header.number("NumberOfFrames", blank=1)
    if pixels > LARGEST_FRAME or pixels * frames * header.number("BitsAllocated") / 8 > LARGEST_PIXELS:
        return TOO_LARGE
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return Problem(
            "compressed_unknown",
            f"The pixels are compressed ({name}) and no package that medseg can use decodes that. "
            "Export the series uncompressed.",
        )
    if not decoder.is_available:
        return _no_codec(name, CODECS)
    if syntax == JPEG_EXTENDED and "pylibjpeg" not in decoder.available_plugins and _first_bits(stream) > 8:
        return _no_codec(f"{name} with more than 8 bits", TWELVE_BITS)
    return None


def whole_parts(stream: BinaryIO, size: int | None) -> int:
    """Return how many whole parts compressed pixels have behind their table of offsets; -1 where one is cut.

    `stream` is at the first item and ends at `size`, if that is known.
    """
    count = -1
    while len(head := stream.read(8)) == 8 and head[:4] == ITEM:
        end = stream.tell() + int.from_bytes(head[4:], "little")
        if size is not None and end > size:
            return -1
        count += 1
        stream.seek(end)
    return count


def decoded_frames(data: Dataset, frames: Sequence[int] | None = None) -> Iterator[Array]:
    """Yield the stored values (rows, columns) of frames of a file that was read with its pixels, or of all of them.

    Raises InputError where nothing installed decodes them, UnreadableFile where they are missing or damaged.
    """
    from pydicom.pixels.utils import iter_pixels
    from pydicom.uid import ExplicitVRLittleEndian

    header = Header({int(tag): data.get_item(tag) for tag in data.keys()})  # noqa: SIM118 - iterating converts them
    count = int(header.number("NumberOfFrames", blank=1)) or 1
    wanted = range(count) if frames is None else frames
    compressed = (data.get("PixelData") or b"")[:4] == ITEM
    if compressed:
        _check_frames(data, header, count, wanted)
    elif data.file_meta.TransferSyntaxUID not in UNCOMPRESSED:
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    bits = data.BitsAllocated
    try:
        if bits == 1 and not compressed:
            yield from _bits(data, wanted)
        elif bits == 1 and data.file_meta.TransferSyntaxUID == RLE:
            yield from _run_lengths(data, wanted, count)
        else:
            yield from iter_pixels(data, raw=True, indices=[*wanted])
    except RuntimeError as error:
        raise UnreadableFile(
            f"No installed decoder can decode the pixels ({data.file_meta.TransferSyntaxUID.name}): they are damaged, "
            "or in a variety of the compression that it does not know. Export the series uncompressed.",
            reason="undecodable",
        ) from error


def _check_frames(data: Dataset, header: Header, count: int, wanted: Sequence[int]) -> None:
    """Raise what `decoded_frames` raises, before a decoder makes room for what a frame says of itself."""
    from pydicom.encaps import generate_frames

    syntax = str(data.file_meta.TransferSyntaxUID)
    problem = compression_problem(syntax, BytesIO(data.PixelData), header)
    if problem:
        raise InputError(problem.text, reason=problem.reason)
    rows, columns = int(header.number("Rows")), int(header.number("Columns"))
    offsets = None
    if "ExtendedOffsetTable" in data:
        offsets = (data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths)
    size = ceil(rows * columns * header.number("BitsAllocated") * header.number("SamplesPerPixel", blank=1) / 8)
    chosen, found = set(wanted), 0
    for number, frame in enumerate(generate_frames(data.PixelData, number_of_frames=count, extended_offsets=offsets)):
        if number not in chosen:
            continue
        found += 1
        picture = _picture(frame)
        fits = size <= RLE_RATIO * len(frame) if syntax == RLE else picture is not None
        if not fits or (picture and syntax != RLE and picture[:2] != (rows, columns)):
            raise UnreadableFile("Compressed pixels are damaged, or have another size than the header says.")
    if found < len(chosen):
        raise UnreadableFile("A DICOM file has fewer frames than its header says. Copy or export it again.")


def _bits(data: Dataset, wanted: Sequence[int]) -> Iterator[Array]:
    """Yield frames of one bit for a pixel: pydicom takes those that begin with a byte, and they follow bit on bit."""
    packed, size = np.frombuffer(data.PixelData, np.uint8), data.Rows * data.Columns
    for frame in wanted:
        start, skipped = divmod(frame * size, 8)
        bits = np.unpackbits(packed[start : start + ceil((skipped + size) / 8)], bitorder="little")
        yield bits[skipped : skipped + size].reshape(data.Rows, data.Columns)


def _run_lengths(data: Dataset, wanted: Sequence[int], count: int) -> Iterator[Array]:
    """Yield frames of one bit for a pixel in RLE, which knows bytes alone: a pixel fills one, or eight share one."""
    from pydicom.pixels.decoders.base import get_decoder

    decoder, size = get_decoder(data.file_meta.TransferSyntaxUID), data.Rows * data.Columns
    layout = {"rows": 1, "bits_allocated": 8, "bits_stored": 8, "samples_per_pixel": 1, "pixel_representation": 0}
    words = {"photometric_interpretation": "MONOCHROME2", "pixel_keyword": "PixelData"}
    for number in wanted:
        for columns in (size, ceil(size / 8)):
            try:
                stored, _ = decoder.as_array(
                    data.PixelData, index=number, raw=True, columns=columns, number_of_frames=count, **layout, **words
                )
            except RuntimeError:
                if columns < size:
                    raise
            else:
                break
        bits = stored.ravel() if columns == size else np.unpackbits(stored.ravel(), bitorder="little")[:size]
        yield np.asarray(bits).reshape(data.Rows, data.Columns)


def _no_codec(name: str, advice: str) -> Problem:
    return Problem(
        "compressed_no_codec",
        f"The pixels are compressed ({name}) and no installed package decodes that. {advice}",
    )


def _first_bits(stream: BinaryIO) -> int:
    """Return how many bits the first frame says that a pixel has, 0 where it does not tell."""
    head = stream.read(8)
    stream.seek(int.from_bytes(head[4:], "little") + 8, 1)
    picture = _picture(stream.read(1 << 16))
    return picture.bits if picture else 0


def _picture(frame: bytes) -> Picture | None:
    """Return what a codestream says of itself; None where it is no such stream."""
    try:
        if frame[:2] == b"\xff\xd8":
            return _jpeg(frame)
        start = frame.find(b"\xff\x4f\xff\x51", 0, 1 << 12)  # JP2 may wrap the codestream
        if start >= 0:
            right, lower, left, upper = struct.unpack_from(">4I", frame, start + 8)
            return Picture(lower - upper, right - left, 0)
    except struct.error:
        pass
    return None


def _jpeg(frame: bytes) -> Picture | None:
    """Return the size behind the first marker that has one (ITU-T T.81 B.2.2, T.87 C.2.2)."""
    place = 2
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        if frame[place + 1] in SIZE_MARKERS:
            bits, rows, columns = struct.unpack_from(">BHH", frame, place + 4)
            return Picture(rows, columns, bits)
        fill = frame[place + 1] == 0xFF
        place += 1 if fill else 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None
