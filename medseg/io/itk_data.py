"""Where the voxels of an NRRD or MetaImage file lie: in it, or in regular files beside it, and nowhere else.

A header may name any file of the system, and ITK would read it: what lies elsewhere, a pipe or a device is refused. The
header is read here as teem and MetaIO read it, so that none of them sees a field that is not seen here.
Source: https://teem.sourceforge.net/nrrd/format.html and https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from medseg.errors import UnreadableFile
from medseg.io.files import check_regular

LONGEST_LINE = 2**16
LARGEST_HEADER = 2**24
MOST_FILES = 10_000
LOCAL = ("LOCAL", "Local", "local")
LIST = re.compile(r"LIST(\s+\d+)?")

DEFLATED = 1040
"""How many times as large as in the file voxels may be: deflate packs 1032 bytes into one at most."""

PATTERN = re.compile(r"([^%]*%0?\d{0,2}d[^%]*?)\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})(?:\s+[123])?")
"""Numbered files in an NRRD header: the name for printf, first and last number, and step."""


def text_header(path: Path, *, nrrd: bool) -> tuple[Mapping[str, str], int]:
    """Return the fields of the header, their names in lower case, and where it ends in the file.

    The names in a list of an NRRD's data files stand in the field "data file", a line for each, after LIST.
    """
    fields: dict[str, str] = {}
    with path.open("rb") as stream:
        if nrrd and not stream.readline(LONGEST_LINE).startswith(b"NRRD000"):
            raise UnreadableFile("An NRRD header was expected and something else came. Check what the file really is.")
        for text in _lines(stream):
            stated, value = _parted(text, nrrd=nrrd)
            name = stated.lower().replace("datafile", "data file" if nrrd else "datafile")
            if name in fields and name in ("data file", "encoding", "sizes", "type"):
                raise UnreadableFile("The header gives one field twice. Export the file again.")
            fields[name] = value
            if name == "data file" and LIST.fullmatch(value):
                fields[name] = "\n".join(["LIST", *filter(None, _lines(stream))])
            elif name == "elementdatafile" and stated != "ElementDataFile":  # MetaIO would look further
                raise UnreadableFile("The header spells ElementDataFile in another way. Export the file again.")
            elif not text or name == "elementdatafile":
                break
        return fields, stream.tell()


def _lines(stream: IO[bytes]) -> Iterator[str]:
    for line in iter(lambda: stream.readline(LONGEST_LINE), b""):
        if stream.tell() > LARGEST_HEADER:
            raise UnreadableFile("The header does not end. Check what the file really is.")
        if line.count(b"\r") > line.endswith(b"\r\n"):  # teem ends a line there
            raise UnreadableFile("The header has damaged line ends. Export the file again.")
        yield line.decode("utf-8", "surrogateescape").strip()


def _parted(text: str, *, nrrd: bool) -> tuple[str, str]:
    """Return name and value of a line; MetaIO takes = and : for one another."""
    match = re.fullmatch(r"([^:]*?)\s*:\s*(.*)" if nrrd else r"([^=:]*?)\s*[=:]\s*(.*)", text, re.DOTALL)
    return (match[1], match[2]) if match else (text, "")


def data_files(path: Path, fields: Mapping[str, str], *, nrrd: bool) -> list[Path]:
    """Return the files that hold the voxels. Raises UnreadableFile for what is no regular file beside the header."""
    given = fields.get("data file" if nrrd else "elementdatafile", "")
    if not given or (not nrrd and (given in LOCAL or given.startswith("LIST") or {"%", "\0"} & set(given))):
        return [path]
    files = []
    for name in _names(given) if nrrd else [given]:
        if not re.fullmatch(r"(\./)?[^/\\:\0]+", name) or name in (".", ".."):
            raise UnreadableFile(
                "The header names voxels in another folder. They are read from files beside the header: move them "
                "there, or save the image as one file.",
                reason="elsewhere",
            )
        file = path.parent / name
        check_regular(file)
        files.append(file)
    return files


def _names(given: str) -> list[str]:
    """Return the names of data files in an NRRD header."""
    first, *listed = given.split("\n")
    if listed or first == "LIST":
        return listed
    if "%" not in given:
        return [given]
    match = PATTERN.fullmatch(given)
    start, stop, step = (int(match[group]) for group in (2, 3, 4)) if match else (0, 0, 0)
    if not match or not step or not 0 <= (stop - start) // step < MOST_FILES:
        raise UnreadableFile("The header numbers its data files in a way that is not known. Save it as one file.")
    return [match[1] % number for number in range(start, stop + (1 if step > 0 else -1), step)]


def check_size(files: list[Path], fields: Mapping[str, str], expected_bytes: int) -> None:
    """Raise EOFError where an NRRD's files cannot hold its voxels, before memory is taken for them."""
    held = sum(file.stat().st_size for file in files)
    most = {"raw": held, "gzip": DEFLATED * held, "gz": DEFLATED * held}.get(fields.get("encoding", "").lower())
    if most is not None and expected_bytes > most:
        raise EOFError
