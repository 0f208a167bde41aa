"""What packed files hold, seen from their first bytes: archives of DICOM files, and DICOM files packed one by one."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePath
from typing import IO, Any

from medseg.io.dicom_file import begins_as_dicom

DICOM_ENDINGS = frozenset({".dcm", ".ima", ".dicom"})
"""How names end that say of a file that it is DICOM."""

Member = tuple[str, int, IO[bytes] | None]
"""Name, size and content of a file that is packed: None where it is encrypted, -1 where its size is not known."""

STREAMS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
}
TARS = frozenset({".tar", ".tgz"})
PACKED_ENDINGS = frozenset({*STREAMS, *TARS, ".zip", ".7z", ".rar", ".zst", ".lz4", ".z"})
"""How names of packed files end. Those that Python does not unpack are not looked into."""

MOST_LOOKED_AT = 200
"""Members of an archive that are looked at."""

FIRST_BYTES = 2048
"""How much of a file is looked at: a slice names itself there."""


def unpacked_name(name: str) -> str:
    """Return the name of a file without the endings that say how it is packed."""
    while PurePath(name).suffix.lower() in PACKED_ENDINGS:
        name = PurePath(name).stem
    return name


def holds_dicom(path: Path, copies: Collection[Path] = ()) -> bool | None:
    """Return whether a packed file holds DICOM files of which none of the files `copies` is a copy.

    Members are known by their names or by how they begin, copies by name, size and how they begin. None where the file
    cannot be looked into.
    """
    named: dict[str, list[Path]] = {}
    for copy in copies:
        named.setdefault(copy.name, []).append(copy)
    try:
        for name, size, file in islice(_members(path), MOST_LOOKED_AT):
            head = None if file is None else file.read(FIRST_BYTES)
            is_copied = any(_is_copy(one, size, head) for one in named.get(PurePath(name).name, ()))
            if not is_copied and _is_dicom(name, head or b""):
                return True
        return False
    except Exception:  # noqa: BLE001 - the decoders of Python raise a dozen kinds for what is damaged or not known
        return None


def _is_copy(file: Path, size: int, head: bytes | None) -> bool:
    """Return whether a file has this size and, if it is known, begins so: slices of other folders have equal names."""
    if file.stat().st_size != size or head is None:
        return file.stat().st_size == size
    with file.open("rb") as opened:
        return opened.read(FIRST_BYTES) == head


def _is_dicom(name: str, head: bytes) -> bool:
    return PurePath(name).suffix.lower() in DICOM_ENDINGS or begins_as_dicom(BytesIO(head))


def _members(path: Path) -> Iterator[Member]:
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if TARS & {*endings}:
        return _of_tar(path)
    if endings[-1] == ".zip":
        return _of_zip(path)
    if endings[-1] in STREAMS:
        return _of_stream(path, STREAMS[endings[-1]])
    raise NotImplementedError(endings[-1])


def _of_tar(path: Path) -> Iterator[Member]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                yield member.name, member.size, archive.extractfile(member)


def _of_zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.flag_bits & 1:
                yield member.filename, member.file_size, None
            elif not member.is_dir():
                with archive.open(member) as packed:
                    yield member.filename, member.file_size, packed


def _of_stream(path: Path, unpacking: Callable[[Path], Any]) -> Iterator[Member]:
    with unpacking(path) as unpacked:
        yield path.stem, -1, unpacked
