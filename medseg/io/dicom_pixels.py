"""The pixels of DICOM files: straight from where they lie where they are not compressed, else through pydicom."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from medseg.errors import UnreadableFile
from medseg.io.dicom_compressed import UNKNOWN_SYNTAX, compression_problem, decoded_frames, whole_parts
from medseg.io.dicom_file import (
    ITEM,
    LARGEST_PIXELS,
    PIXELS,
    UNCOMPRESSED,
    UNDEFINED,
    Found,
    Parsed,
    read_data,
    unpacked,
)
from medseg.io.dicom_geometry import Problem
from medseg.io.dicom_header import Header, parsing
from medseg.io.dicom_refusals import LAYOUT, Pixels
from medseg.volume import Array

PIXEL_DATA = 0x7FE00010
DELIMITER, DELIMITER_BIG_ENDIAN = b"\xfe\xff\xdd\xe0", b"\xff\xfe\xe0\xdd"
GE_BIG_ENDIAN = "1.2.840.113619.5.2"
"""A transfer syntax of GE: the header as in implicit VR, the pixels big-endian words."""

PIXEL_REASONS = frozenset({
    *("no_pixels", "missing_attribute", "bit_layout", "transfer_syntax", "too_large"),
    *("compressed_no_codec", "compressed_unknown"),
})  # fmt: skip
"""Reasons that say of a slice how its pixels are stored, and not what it shows."""


class Native(NamedTuple):
    """Where the element with uncompressed pixels starts, the bytes before its values, and their layout.

    In a deflated file it starts there in what the file unpacks to from `packed_from` on.
    """

    start: int
    head: bytes
    shape: tuple[int, int]
    dtype: str
    unused_bits: int
    packed_from: int | None


class Located(NamedTuple):
    """What a file has for pixels, where, what forbids to read them as they are stored, and whether all are there."""

    kind: Pixels
    native: Native | None = None
    problem: Problem | None = None
    are_whole: bool = True


def locate(parsed: Parsed, found: Found, header: Header, frames: int) -> Located:
    """Return where the pixels of a file begin that was parsed up to them.

    Those that are compressed or in layouts that are rare are "decoded", by pydicom. How the element is encoded is what
    the parser found there. Compressed pixels begin with an item (PS3.5 A.4); others are not compressed, whatever the
    file says.
    """
    if found.tag != PIXEL_DATA:
        return Located("float" if found.tag in PIXELS else "none")
    start = parsed.stream.tell()
    head = parsed.stream.read(_head_bytes(found.vr))
    is_compressed = False
    if found.length == UNDEFINED or parsed.syntax not in UNCOMPRESSED:
        is_compressed = parsed.stream.read(4) == ITEM
        parsed.stream.seek(start + len(head))
    size = None if parsed.packed_from is not None else os.fstat(parsed.stream.fileno()).st_size
    if is_compressed:
        problem = compression_problem(parsed.syntax, parsed.stream, header)
        parsed.stream.seek(start + len(head))
        return Located("decoded", None, problem, problem is not None or whole_parts(parsed.stream, size) >= frames)
    order = _byte_order(parsed)
    if order is None:
        return Located("stored", problem=UNKNOWN_SYNTAX)
    left = LARGEST_PIXELS if size is None else size - start - len(head)
    native = Native(start, head, (0, 0), order, 0, parsed.packed_from)
    if found.length != UNDEFINED:
        return _layout(parsed, header, native, frames, found.length, left)
    located = _layout(parsed, header, native, frames, left, left)
    return located if _ends_behind(parsed, located.native, frames) else located._replace(problem=UNKNOWN_SYNTAX)


def _ends_behind(parsed: Parsed, native: Native | None, frames: int) -> bool:
    """Return whether the delimiter of an element of undefined length follows the last of its pixels."""
    if native is None:
        return False
    size = native.shape[0] * native.shape[1] * int(native.dtype[-1]) * frames
    parsed.stream.seek(native.start + len(native.head) + size + size % 2)
    return parsed.stream.read(4) in {DELIMITER, DELIMITER_BIG_ENDIAN}


def _head_bytes(vr: str | None) -> int:
    """Return how many bytes stand before the value of an element."""
    from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

    return 12 if vr in EXPLICIT_VR_LENGTH_32 else 8


def _byte_order(parsed: Parsed) -> str | None:
    """Return the byte order of uncompressed pixels; None for a transfer syntax that is not known."""
    from pydicom.uid import UID

    if parsed.syntax == GE_BIG_ENDIAN and parsed.implicit:
        return ">"
    if parsed.syntax and not UID(parsed.syntax).is_transfer_syntax:
        return None
    return "<" if parsed.little_endian else ">"


def _layout(parsed: Parsed, header: Header, native: Native, frames: int, length: int, left: int) -> Located:
    """Return `native`, which has the byte order for a type, with the layout that the header states.

    The element says that it has `length` bytes, and the file has `left` behind its head.
    """
    numbers = [header.number(name) for name in LAYOUT]
    if not all(number.is_integer() for number in numbers):
        return Located("decoded", are_whole=length <= left)
    rows, columns, allocated, stored, signed = map(int, numbers)
    if native.dtype == ">" and allocated == 8:
        # Pairs of bytes may have changed places, which pydicom knows; of the syntax of GE nobody does.
        return Located("decoded", problem=UNKNOWN_SYNTAX if parsed.implicit else None, are_whole=length <= left)
    if allocated not in {8, 16, 32} or not 1 <= stored <= allocated or signed not in {0, 1}:
        return Located("decoded", are_whole=length <= left)
    dtype = f"{native.dtype}{'ui'[signed]}{allocated // 8}"
    native = native._replace(shape=(rows, columns), dtype=dtype, unused_bits=allocated - stored)
    size = rows * columns * frames * allocated // 8
    said_otherwise = parsed.syntax not in {*UNCOMPRESSED, GE_BIG_ENDIAN, ""}
    problem = UNKNOWN_SYNTAX if said_otherwise and length != size + size % 2 else None
    return Located("stored", native, problem, are_whole=0 < size <= min(length, left))


def read_pixels(path: Path, frames: Sequence[int] = (0,), native: Native | None = None) -> list[Array]:
    """Return the stored values (rows, columns) of frames of a file, unused bits cleared and the sign extended.

    `native` is what `locate` found, which saves parsing the file again. Nothing is rescaled. The values of MONOCHROME1
    are left as they are, too: it asks to show them inverted, and says nothing about what they mean
    (PS3.3 C.7.6.3.1.2).
    Raises what `decoded_frames` raises, and UnreadableFile where pixels are missing or damaged.
    """
    with parsing(path):
        if native is not None:
            return [*_straight(path, frames, native)]
        return [*decoded_frames(read_data(path, pixels=True), frames)]


def _straight(path: Path, frames: Sequence[int], native: Native) -> Iterator[Array]:
    dtype = np.dtype(native.dtype)
    size = native.shape[0] * native.shape[1] * dtype.itemsize
    with path.open("rb", buffering=0) as opened:
        file: BinaryIO = opened
        if native.packed_from is not None:
            opened.seek(native.packed_from)
            file = unpacked(opened, LARGEST_PIXELS + native.start)
        file.seek(native.start)
        if file.read(len(native.head)) != native.head:
            raise UnreadableFile("A DICOM file has changed while it was read. Read it again.", path=path)
        for frame in frames:
            file.seek(native.start + len(native.head) + frame * size)
            values = np.frombuffer(file.read(size), dtype).reshape(native.shape)
            yield values << native.unused_bits >> native.unused_bits if native.unused_bits else values
