"""Files that are no DICOM and may still be slices: damaged, empty, packed, or saved by something else.

A scan that is short at its end shows no gap, so whatever could be a slice is missed. What certainly is none, such as a
text or a picture, may lie anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePath

from medseg.errors import UnreadableFile
from medseg.io.files import leads_nowhere
from medseg.io.packed import DICOM_ENDINGS, PACKED_ENDINGS, holds_dicom, unpacked_name

PARTIAL_ENDINGS = frozenset({".part", ".partial", ".filepart", ".crdownload", ".download", ".tmp", ".icloud"})
"""How names end of files that have not been copied to their end."""

STANDS_FOR = re.compile(r"\.(.+\.icloud)", re.IGNORECASE)
"""The hidden name of what stands for a file that lies with a provider of storage alone."""

OTHER_ENDINGS = frozenset({
    ".txt", ".md", ".rst", ".rtf", ".log", ".csv", ".tsv", ".json", ".xml", ".xsl", ".xsd", ".yaml", ".yml", ".toml",
    ".html", ".htm", ".css", ".js", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx",
    ".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ico", ".svg", ".tif", ".tiff", ".webp", ".mp4", ".avi", ".mov", ".mpg",
    ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".mgz", ".mgh", ".mnc", ".stl", ".h5", ".hdf5",
    ".bval", ".bvec", ".mat", ".npy", ".npz", ".safetensors", ".py", ".ipynb", ".sh", ".bat", ".exe", ".dll", ".so",
    ".jar", ".class", ".cab", ".msi", ".chm", ".hlp", ".ttf", ".manifest", ".config", ".pyc", ".swp", ".lock",
    ".odt", ".ods", ".odp", ".xlsm", ".docm", ".ps", ".eps", ".psd", ".heic", ".wmv", ".mkv", ".webm", ".wav", ".mp3",
    ".vtk", ".vtp", ".vti", ".vtu", ".ply", ".obj", ".mrml", ".mrb", ".fcsv", ".mif", ".tck", ".trk", ".par", ".rec",
    ".rda", ".pkl", ".pt", ".pth", ".onnx", ".done", ".complete",
    ".ini", ".inf", ".cfg", ".db", ".sqlite", ".lnk", ".url", ".md5", ".sha1", ".sha256", ".sha512",
})  # fmt: skip
"""How names of files end that lie beside slices and are none."""

MAGIC = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"%PDF", b"\xd0\xcf\x11\xe0", b"SQLite format"),
    *(b"MZ", b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"),
)
"""How pictures, documents, data bases and programs begin."""

WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html|<head)", re.IGNORECASE)
"""How a web page begins, such as one on an error that was saved under the name of a slice."""

PACKED = "A packed file holds DICOM files, or may do so, which would be left out. Unpack it, or move it elsewhere."
CALLED = "A file is called {} and is empty, damaged or not DICOM. Copy or export it again."
LIKELY = (
    "A file beside the slices or named like them is empty, damaged or not DICOM: a slice may be missing. "
    "Copy or export it again, or move it elsewhere."
)

FIRST_BYTES = 2048

NUMBERS = re.compile("[0-9a-f]*[0-9][0-9a-f]*")
"""What differs between the names of slices: counts, UIDs and hashes."""


def may_hold_slices(file: Path) -> bool:
    """Return whether to look into a file: it is there, or it is a link that leads nowhere, and may be a lost slice."""
    return file.is_file() or (leads_nowhere(file) and not _is_something_else(file))


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a hidden file, which does not stand for another."""
    return name.startswith(".") and not STANDS_FOR.fullmatch(name)


def name_kind(name: str) -> tuple[str, str]:
    """Return what the names of the slices of a series have in common: a name without its numbers, and its ending."""
    path = PurePath(_whole_name(name))
    ending = path.suffix.lower() if re.search("[a-z]", path.suffix, re.IGNORECASE) else ""
    return NUMBERS.sub("#", path.name[: len(path.name) - len(ending)].lower()), ending


def lost_slices(others: Sequence[Path], slices: Sequence[Path]) -> list[UnreadableFile]:
    """Return an error for each of `others`, none of which is DICOM, that could be a slice beside these files.

    That are those called .dcm or .ima, wherever they lie; packed DICOM files of which there is no copy; and, beside
    slices or under a name like theirs, what is empty or neither a text nor another known kind of file. A DICOMDIR,
    hidden files, marks, and those that other endings tell to be something else may lie anywhere.
    """
    others = [file for file in others if not _is_something_else(file)]
    if not others:
        return []
    folders = {file.parent for file in slices}
    kinds = {name_kind(file.name) for file in slices}
    names = {name for name, _ in kinds}
    are_counted = all(re.search("[0-9]", file.name) for file in slices)
    found = []
    for file in others:
        kind, beside = name_kind(file.name), file.parent in folders
        near, alike = beside or kind[0] in names, kind in kinds
        if file.suffix.lower() in PACKED_ENDINGS:
            holds = holds_dicom(file, slices)
            text = PACKED if holds or alike or (holds is None and near) else ""
        elif kind[1] in DICOM_ENDINGS:
            text = "" if _is_dicomdir(file) else CALLED.format(kind[1])
        else:
            near = near and not (are_counted and not alike and is_mark(file.name, _size(file)))
            text = LIKELY if near and _could_be_pixels(file, is_named_so=beside and alike) else ""
        if text and not _is_copied(file):
            found.append(UnreadableFile(text, path=file))
    return found


def is_mark(name: str, size: int) -> bool:
    """Return whether a file is empty and its name has no number: it marks that something is done, or locked."""
    is_named_so = name_kind(name)[1] in DICOM_ENDINGS or PurePath(name).suffix.lower() in PACKED_ENDINGS
    return size == 0 and not is_named_so and not re.search("[0-9]", name)


def _is_something_else(file: Path) -> bool:
    ending = PurePath(_whole_name(file.name)).suffix.lower()
    if is_hidden(file.name) or file.name.upper() == "DICOMDIR" or ending in OTHER_ENDINGS:
        return True
    return ending == ".img" and file.with_suffix(".hdr").exists()  # a volume of two files


def _is_copied(file: Path) -> bool:
    """Return whether a packed or partial file lies beside the whole one."""
    name = _whole_name(file.name)
    return name != file.name and file.with_name(name).is_file()


def _whole_name(name: str) -> str:
    """Return the name that a file has when it is copied to its end and unpacked."""
    stands_for = STANDS_FOR.fullmatch(name)
    path = PurePath(stands_for[1] if stands_for else name)
    return unpacked_name(path.stem if path.suffix.lower() in PARTIAL_ENDINGS else name)


def _is_dicomdir(file: Path) -> bool:
    return _head(file)[128:132] == b"DICM"  # and holds no slices


def _could_be_pixels(file: Path, *, is_named_so: bool) -> bool:
    """Return whether a file holds neither a text nor another known kind; one that is named like the slices is one."""
    head = _head(file)
    if _is_dicomdir(file):
        return False
    is_text = bool(head) and not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head)
    return is_named_so or WEB_PAGE.match(head) is not None or not (is_text or head.startswith(MAGIC))


def _head(file: Path) -> bytes:
    with suppress(OSError), file.open("rb") as opened:
        return opened.read(FIRST_BYTES)
    return b""


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # gone meanwhile
