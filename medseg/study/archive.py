"""Archives of studies, unpacked where they can do no harm."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

from medseg.errors import InputError, UnreadableFile
from medseg.io.dicom_file import begins_as_dicom
from medseg.io.dicom_lost import DICOM_ENDINGS, OTHER_ENDINGS
from medseg.io.files import reading

LARGEST_ARCHIVE = 32 * 2**30
"""Bytes that an archive may unpack to: more than any study, less than a disk."""

MOST_MEMBERS = 200_000
CHUNK = 1 << 20

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What zipfile raises for archives that are damaged, encrypted, or packed in a way that it does not know."""


@contextmanager
def opened(path: str | PathLike[str], beside: str | PathLike[str] | None = None) -> Iterator[Path]:
    """Give a path that `find_studies` takes: `path` itself, or the folder that a .zip is unpacked to for so long.

    The folder is made in `beside`, by default where the system keeps what is temporary, and removed at the end.
    Raises what `unpack` raises.
    """
    if not is_archive(Path(path)):
        yield Path(path)
        return
    with TemporaryDirectory(dir=beside) as folder:
        unpack(path, folder)
        yield Path(folder)


def is_archive(path: Path) -> bool:
    """Return whether a path is a file that is called .zip."""
    return path.suffix.lower() == ".zip" and path.is_file()


def unpack(path: str | PathLike[str], folder: str | PathLike[str], *, largest: int = LARGEST_ARCHIVE) -> None:
    """Write the files of a zip archive to a folder, under numbers for names, each folder of the archive in its own.

    Endings that say what a file is stay, and hidden files and a DICOMDIR are hidden, for `lost_slices` to tell.
    Raises InputError for members that point elsewhere, are encrypted, or unpack to more than `largest` bytes in all
    (`unsafe_archive`), and for archives of DICOM files among them (`nested_archive`); UnreadableFile for an archive
    that is damaged.
    """
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _check(members)
            folders: dict[PurePosixPath, Path] = {}
            for number, member in enumerate(members):
                named = PurePosixPath(member.filename)
                home, ending = named.parent, named.suffix.lower()
                hidden = "." if named.name.startswith(".") or named.name.upper() == "DICOMDIR" else ""
                ending = ending if ending in DICOM_ENDINGS | OTHER_ENDINGS else ""
                folders.setdefault(home, Path(folder) / str(len(folders))).mkdir(exist_ok=True)
                target = folders[home] / f"{hidden}{number}{ending}"
                largest -= _copy(archive, member, target, largest)
                if ending == ".zip" and _holds_dicom(target):
                    raise InputError(
                        "The archive holds another archive with DICOM files, which would be left out. Unpack it first.",
                        reason="nested_archive",
                    )
    except DAMAGED as error:
        raise UnreadableFile("The archive is damaged or no zip. Copy or pack it again.", path=path) from error


def _check(members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MOST_MEMBERS:
        raise _unsafe(f"it has {len(members)} members, and {MOST_MEMBERS} are allowed")
    for member in members:
        for name in (PurePosixPath(member.filename), PureWindowsPath(member.filename)):
            if name.is_absolute() or name.drive or ".." in name.parts:
                raise _unsafe("a member would be written outside of its folder")
        if member.flag_bits & 1:
            raise _unsafe("it is encrypted")


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, allowed: int) -> int:
    """Return how many bytes were written; what the archive says of its sizes is not trusted."""
    count = 0
    with archive.open(member) as packed, target.open("wb") as file:
        while chunk := packed.read(CHUNK):
            count += len(chunk)
            if count > allowed:
                raise _unsafe(f"it unpacks to more than {LARGEST_ARCHIVE / 2**30:.0f} GB")
            file.write(chunk)
    return count


def _holds_dicom(path: Path) -> bool:
    """Return whether an archive, as far as it can be read, has files that are called or begin as DICOM."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_is_dicom(archive, member) for member in archive.infolist() if not member.is_dir())
    except DAMAGED:
        return False


def _is_dicom(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    if PurePosixPath(member.filename).suffix.lower() in DICOM_ENDINGS:
        return True
    if member.flag_bits & 1:
        return False
    with archive.open(member) as packed:
        return begins_as_dicom(packed)


def _unsafe(what: str) -> InputError:
    return InputError(
        f"The archive is not unpacked: {what}. Unpack it yourself if you trust it.", reason="unsafe_archive"
    )
