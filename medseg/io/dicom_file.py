"""DICOM files as they come: with a preamble or without, in whatever encoding their data show, unpacked within bounds.

pydicom parses the elements. Where they begin and how they are encoded is found here, from the data: file meta that
is missing, or says otherwise, is common.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from medseg.errors import UnreadableFile

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag

    Stop = Callable[[BaseTag, str | None, int], bool]

DEFLATED = "1.2.840.10008.1.2.1.99"
DIRECTORY = "1.2.840.10008.1.3.10"
"""The transfer syntax of deflated files, and the class of a DICOMDIR (PS3.6)."""

UNDEFINED = 0xFFFFFFFF
ITEM = b"\xfe\xff\x00\xe0"

LARGEST_ELEMENT = 2**28
"""Bytes that an element of a header may have."""

LARGEST_HEADER, LARGEST_OBJECT = 2**26, 2**30
"""Bytes that the header of a deflated file may unpack to, and all of an object of labels."""

LARGEST_PIXELS = 2**33
"""Bytes that the pixels of a deflated or compressed scan may have."""

MOST_ITEMS = 500_000
"""Items that a deflated header may have: each takes eight bytes there, and a kilobyte when it is parsed."""

CHUNK = 1 << 16
FIRST_BYTES = 256
"""Bytes in which a data set without a preamble shows its first two elements."""


class Found:
    """Where parsing stopped: the element's tag, VR (None where it is implicit) and length; `tag` is None at the end."""

    def __init__(self, stops: Collection[int], wanted: Collection[int] = ()):
        self.stops, self.wanted = stops, wanted
        self.tag: int | None = None
        self.vr: str | None = None
        self.length = 0

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        """Tell pydicom to stop before the first of `stops`. Raises UnreadableFile for a `wanted` one without bounds."""
        if tag in self.stops:
            self.tag, self.vr, self.length = tag, vr, length
            return True
        if length > LARGEST_ELEMENT and length != UNDEFINED and tag in self.wanted:
            raise UnreadableFile(
                "A DICOM file is damaged: a part of its header claims to have over 256 MB. Copy or export it again."
            )
        return False


@dataclass(frozen=True)
class Parsed:
    """The elements of a file, and how it is encoded.

    `syntax` is the transfer syntax that the file states, "" for none; `sop_class` the class of object. `implicit` and
    `little_endian` are what the data show. `stream` is where parsing went on: the file itself, or what it unpacks to
    from `packed_from` on.
    """

    data: Dataset
    meta: Dataset
    syntax: str
    implicit: bool
    little_endian: bool
    stream: BinaryIO
    packed_from: int | None

    @property
    def is_directory(self) -> bool:
        """Whether the file is a DICOMDIR."""
        return str(self.meta.get("MediaStorageSOPClassUID", "")) == DIRECTORY


def begins_as_dicom(file: IO[bytes]) -> bool:
    """Return whether a file that was opened just now begins as DICOM files do (PS3.10 7.1), or with elements alone."""
    head = file.read(132 + FIRST_BYTES)
    return head[128:132] == b"DICM" or _are_elements(head)


def parse(file: BinaryIO, stop: Stop, tags: Collection[BaseTag] = (), *, most: int | None = None) -> Parsed | None:
    """Return the elements, or those with `tags`, of a file that was opened just now; None where it is not DICOM.

    Parsing ends where `stop` says so; `stream` is then at that element.
    Raises UnreadableFile for deflated files that unpack to more than `most` bytes, by default those of a header.
    """
    from pydicom.filereader import read_dataset

    head = file.read(132)
    if head[128:] != b"DICM":
        if not _are_elements(head + file.read(FIRST_BYTES)):
            return None
        file.seek(0)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_behind_meta)
    syntax, packed_from = str(meta.get("TransferSyntaxUID") or ""), None
    start = file.tell()
    if syntax == DEFLATED and not _are_elements(file.read(FIRST_BYTES)):
        file.seek(start)
        packed_from, start = start, 0
        file = unpacked(file, most or LARGEST_HEADER, MOST_ITEMS)
    file.seek(start)
    first = file.read(6)
    file.seek(start)
    implicit = not (first[4:].isalpha() and first[4:].isupper())
    little_endian = implicit or first[1] < 4  # data sets begin with a low group: 0008, as a rule
    data = read_dataset(file, implicit, little_endian, stop_when=stop, specific_tags=[*tags] or None)
    return Parsed(data, meta, syntax, implicit, little_endian, file, packed_from)


def read_data(path: Path, keywords: Collection[str] = (), *, pixels: bool = False) -> Dataset:
    """Return the elements of a DICOM file, or those with these keywords, without its pixels or with them.

    Its `file_meta` is there, with the transfer syntax that the data show. Call it within `parsing`.
    Raises UnreadableFile (`no_dicom`) for other files.
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.tag import Tag

    tags, most = [Tag(keyword) for keyword in keywords], LARGEST_OBJECT if pixels else LARGEST_HEADER
    with path.open("rb") as file:
        found = parse(file, Found(() if pixels else PIXELS), tags, most=most)
    if found is None:
        raise UnreadableFile("This file is not DICOM. Pass another, or export it again.", path=path, reason="no_dicom")
    data = found.data
    data.file_meta = FileMetaDataset(found.meta)
    data.file_meta.TransferSyntaxUID = shown_syntax(found)
    return data


def shown_syntax(found: Parsed) -> str:
    """Return the transfer syntax of a file: for uncompressed data the one they show, else the one that is stated."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    shown = ImplicitVRLittleEndian if found.implicit else ExplicitVRLittleEndian
    if not found.little_endian:
        shown = ExplicitVRBigEndian
    return shown if found.syntax in {*UNCOMPRESSED, ""} else found.syntax


UNCOMPRESSED = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", DEFLATED})
"""Transfer syntaxes of uncompressed pixels (PS3.5 A.1 to A.3, A.5)."""

PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
"""The tags of pixels: floats of two lengths, and whole numbers."""


def unpacked(file: BinaryIO, most: int, items: int | None = None) -> BinaryIO:
    """Return what a deflated file unpacks to from here on, unpacked as it is read.

    Reading beyond `most` bytes, or more `items` of sequences, raises UnreadableFile (`too_large`).
    """
    return cast(BinaryIO, io.BufferedReader(_Unpacked(file, most, items), CHUNK))


class _Unpacked(io.RawIOBase):
    """A deflated stream (RFC 1951) as a file. To go back it begins anew."""

    def __init__(self, file: BinaryIO, most: int, items: int | None):
        self._file, self._start, self._most, self._most_items = file, file.tell(), most, items
        self._begin()

    def _begin(self) -> None:
        self._file.seek(self._start)
        self._unpacker, self._place, self._items = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence not in {io.SEEK_SET, io.SEEK_CUR}:
            raise io.UnsupportedOperation("A deflated file has no known end.")
        target = offset + (self._place if whence == io.SEEK_CUR else 0)
        if target < self._place:
            self._begin()
        while self._place < target and self._next(min(CHUNK, target - self._place)):
            pass
        return self._place

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        part = self._next(len(into))
        into[: len(part)] = part
        return len(part)

    def _next(self, count: int) -> bytes:
        """Return up to `count` bytes more, none at the end."""
        part = b""
        while not part and not self._unpacker.eof:
            packed = self._unpacker.unconsumed_tail or self._file.read(CHUNK)
            part = self._unpacker.decompress(packed, count)
            if not packed and not part:
                break
        self._place += len(part)
        self._items += part.count(ITEM)
        if self._place > self._most or (self._most_items is not None and self._items > self._most_items):
            raise UnreadableFile(
                "A deflated DICOM file unpacks to more than a header has. Export it uncompressed if you trust it.",
                reason="too_large",
            )
        return part


def _behind_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return bool(tag >> 16 != 2)


def _are_elements(head: bytes) -> bool:
    """Return whether bytes are two elements, as a data set begins: of group 0002 or 0008, the tags in order."""
    from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

    letters = head[4:6].decode("latin-1")
    explicit = letters in VR.__members__
    order = ">" if explicit and head[0] == 0 else "<"
    if explicit and letters not in EXPLICIT_VR_LENGTH_32:
        start, code = 8, "H"
    else:
        start, code = (12 if explicit else 8), "L"
    try:
        (length,) = struct.unpack_from(order + code, head, start - struct.calcsize(order + code))
        first = struct.unpack_from(f"{order}HH", head)
        second = struct.unpack_from(f"{order}HH", head, start + length)
    except struct.error:
        return False
    return bool(first[0] in {2, 8} and first < second)
