"""Archives of studies, unpacked where they can do no harm."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath

from medseg.errors import InputError, MedsegError, OutputError, UnreadableFile
from medseg.io.dicom_file import begins_as_dicom
from medseg.io.dicom_header import silence
from medseg.io.dicom_lost import OTHER_ENDINGS, PARTIAL_ENDINGS, is_hidden, is_mark, name_kind
from medseg.io.files import reading
from medseg.io.leftovers import is_leftover, temporary_folder
from medseg.io.packed import DICOM_ENDINGS, MOST_LOOKED_AT, PACKED_ENDINGS, holds_dicom

LARGEST_ARCHIVE = 32 * 2**30
"""Bytes that an archive may unpack to: more than any study, less than a disk."""

MOST_MEMBERS = 200_000
CHUNK = 1 << 20

PACKED = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA})
"""How members may be packed: not at all, deflate, bzip2, LZMA."""

NAMES = {1: "Shrink", 6: "Implode", 9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
"""What else members are packed with, by the number of the method (APPNOTE 4.4.5)."""


@contextmanager
def opened(path: str | PathLike[str], beside: str | PathLike[str] | None = None) -> Iterator[Path]:
    """Give a path that `find_studies` takes: `path` itself, or the folder that a .zip is unpacked to for so long.

    The folder is made in `beside`, by default where the system keeps what is temporary, and removed at the end.
    Raises what `unpack` raises.
    """
    if not is_archive(Path(path)):
        yield Path(path)
        return
    with temporary_folder(beside) as folder:
        unpack(path, folder)
        yield folder


def is_archive(path: Path) -> bool:
    """Return whether a path is a file that is called .zip."""
    return path.suffix.lower() == ".zip" and path.is_file()


def check_one(files: Sequence[Path]) -> None:
    """Raise UnreadableFile (`several_archives`) where a study lies in an archive and elsewhere, in parts."""
    if len(files) > 1 and is_archive(files[0]):
        raise UnreadableFile(
            "Parts of the study lie in several archives, or beside an archive. Unpack all of it into one folder.",
            path=files[1],
            reason="several_archives",
        )


def contents(path: Path) -> frozenset[tuple[int, int]]:
    """Return checksum and size of each file in an archive; none where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset((one.CRC, one.file_size) for one in archive.infolist() if not one.is_dir())
    except Exception:  # noqa: BLE001 - whoever unpacks it says why
        return frozenset()


def study_uid(path: Path) -> str:
    """Return the StudyInstanceUID of the first DICOM file in an archive; "" for none, and where it cannot be read."""
    from pydicom import dcmread

    try:
        with silence(), zipfile.ZipFile(path) as archive:
            for member in archive.infolist()[:MOST_LOOKED_AT]:
                with archive.open(member) as packed:
                    if begins_as_dicom(packed):
                        packed.seek(0)
                        found = dcmread(packed, stop_before_pixels=True, specific_tags=["StudyInstanceUID"])
                        return str(found.get("StudyInstanceUID") or "")
    except Exception:  # noqa: BLE001 - whoever unpacks it says why
        return ""
    return ""


def unpack(path: str | PathLike[str], folder: str | PathLike[str], *, largest: int = LARGEST_ARCHIVE) -> None:
    """Write the files of a zip archive to a folder, under numbers for names, each folder of the archive in its own.

    What `lost_slices` goes by stays: endings that say what a file is, which names are alike, and which are hidden, a
    DICOMDIR among them.
    Raises InputError for members that point elsewhere, are encrypted, or unpack to more than `largest` bytes in all
    (`unsafe_archive`), for archives of DICOM files among them (`nested_archive`), and for members packed in a way that
    Python does not know (`unknown_compression`); UnreadableFile for an archive that is damaged, OutputError where
    there is no room.
    """
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if _is_wanted(_name(member))]
            _check(members)
            folders: dict[PurePosixPath, Path] = {}
            kinds: dict[tuple[str, str], int] = {}
            for number, member in enumerate(members):
                named = PurePosixPath(_name(member))
                home, ending = named.parent, _telling(named.name)
                passed_over = is_hidden(named.name) or named.name.upper() == "DICOMDIR"
                hidden = "." if passed_over or is_mark(named.name, member.file_size) else ""
                kind = _letters(kinds.setdefault(name_kind(named.name), len(kinds)))
                folders.setdefault(home, Path(folder) / str(len(folders))).mkdir(exist_ok=True)
                target = folders[home] / f"{hidden}{number}_{kind}{ending}"
                largest -= _copy(archive, member, target, largest)
                if ending.endswith(".zip") and holds_dicom(target):
                    raise InputError(
                        "The archive holds another archive with DICOM files, which would be left out. Unpack it first.",
                        reason="nested_archive",
                    )
    except (MedsegError, MemoryError):
        raise
    except Exception as error:  # zipfile and its decoders raise a dozen kinds
        text = "The archive is damaged, is not a zip, or is one part of several. Copy or pack it again."
        raise UnreadableFile(text, path=path) from error


def _is_wanted(name: str) -> bool:
    return not name.endswith("/") and not any(map(is_leftover, PurePosixPath(name).parts))


def _telling(name: str) -> str:
    """Return the endings of a name that say what a file is, such as .nii.gz."""
    path, found = PurePosixPath(name.lower()), ""
    while path.suffix in DICOM_ENDINGS | OTHER_ENDINGS | PACKED_ENDINGS | PARTIAL_ENDINGS:
        path, found = PurePosixPath(path.stem), path.suffix + found
    return found


def _letters(number: int) -> str:
    """Return a number in letters, which are no part of a number to `name_kind`."""
    return "".join("ghijklmnop"[int(digit)] for digit in str(number))


def _check(members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MOST_MEMBERS:
        raise _unsafe(f"it has {len(members)} members, and {MOST_MEMBERS} are allowed")
    for member in members:
        for name in (PurePosixPath(_name(member)), PureWindowsPath(member.filename)):
            if name.is_absolute() or name.drive or ".." in name.parts:
                raise _unsafe("a member would be written outside of its folder")
        if member.flag_bits & 1:
            raise _unsafe("it is encrypted")
        if stat.S_IFMT(member.external_attr >> 16) not in {0, stat.S_IFREG}:
            raise _unsafe("a member is a link or a device and not a file")
        if member.compress_type not in PACKED:
            method = NAMES.get(member.compress_type, f"method {member.compress_type}")
            raise InputError(
                f"The archive is packed with {method}, which Python cannot unpack. Unpack it, or pack it again "
                "with plain deflate.",
                reason="unknown_compression",
            )


def _name(member: zipfile.ZipInfo) -> str:
    """Return the name of a member with slashes: some programs of Windows write backslashes against the standard."""
    return member.filename.replace("\\", "/")


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, allowed: int) -> int:
    """Return how many bytes were written; what the archive says of its sizes is not trusted."""
    count = 0
    with archive.open(member) as packed, target.open("wb") as file:
        while chunk := packed.read(CHUNK):
            count += len(chunk)
            if count > allowed:
                raise _unsafe(f"it unpacks to more than {LARGEST_ARCHIVE / 2**30:.0f} GB")
            try:
                file.write(chunk)
            except OSError as error:
                text = f"The archive could not be unpacked: {error.strerror}. Make room where temporary files go."
                raise OutputError(text, path=target) from error
    return count


def _unsafe(what: str) -> InputError:
    return InputError(
        f"The archive is not unpacked: {what}. Unpack it yourself if you trust it.", reason="unsafe_archive"
    )
