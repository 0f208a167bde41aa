"""The files that a path stands for: those below a folder, those that a DICOMDIR names, or one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.errors import MedsegError, UnreadableFile
from medseg.io.dicom_file import read_data
from medseg.io.dicom_header import parsing
from medseg.io.listing import slice_files

ADDED_ENDINGS = ("", ".dcm", ".ima", ".dicom", ".dic")
"""What copies of a disc add to the names of files, which have no endings there (PS3.10 8.2)."""


Names = dict[str, list[str]]


def listed(path: Path, problems: list[MedsegError]) -> list[Path]:
    """Return the files to look into at or below a path, sorted; what may not be looked at goes to `problems`.

    Raises UnreadableFile for a DICOMDIR that is damaged.
    """
    if path.is_file():
        named = _of_dicomdir(path, problems)
        return [path] if named is None else named

    def fail(error: OSError) -> None:
        text = f"A folder or file could not be opened: {error.strerror}. Check its permissions and its disk."
        problems.append(UnreadableFile(text, path=error.filename))

    return slice_files(path, fail)


def _of_dicomdir(path: Path, problems: list[MedsegError]) -> list[Path] | None:
    """Return the files that a DICOMDIR names, None where the file is no DICOMDIR (PS3.10 8, PS3.3 F)."""
    try:
        named = _file_ids(path)
    except UnreadableFile as error:
        if error.reason == "no_dicom" or path.name.upper() != "DICOMDIR":
            return None  # whoever reads it as a slice will say what is wrong
        text = "The DICOMDIR is damaged. Give the folder that it lies in: its files are found without it."
        raise UnreadableFile(text, path=path) from error
    if named is None:
        return None
    files: list[Path] = []
    missing: list[Path] = []
    known: dict[Path, Names] = {}
    for parts in named:
        if any(part in {"", ".", ".."} or "/" in part for part in parts):
            problems.append(UnreadableFile("The DICOMDIR names a file outside its folder.", path=path))
        elif (file := _found(path.parent, parts, known)) is not None:
            files.append(file)
        else:
            missing.append(path.parent.joinpath(*parts))
    text = (
        f"{len(missing)} of {len(named)} files that the DICOMDIR names are missing. Copy the whole disc, or give the "
        "folder that the DICOMDIR lies in."
    )
    # Once for each folder that has files of a study, which lacks them; once for all others.
    homes = {file.parent for file in files}
    first = {file.parent if file.parent in homes else None: file for file in reversed(missing)}
    problems += [UnreadableFile(text, path=file, reason="missing") for file in first.values()]
    return files


def _file_ids(path: Path) -> list[list[str]] | None:
    """Return the names in a DICOMDIR, each as its parts; None for another file."""
    from pydicom.uid import MediaStorageDirectoryStorage

    with parsing(path):
        data = read_data(path, ["DirectoryRecordSequence"])
        if data.file_meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
            return None
        ids = [record.get("ReferencedFileID") for record in data.get("DirectoryRecordSequence") or ()]
        return [_parts(one) for one in ids if one]


def _parts(file_id: str | Sequence[str]) -> list[str]:
    """Return the components of a File ID; some writers put slashes where the standard has several values."""
    values = [file_id] if isinstance(file_id, str) else [*file_id]
    return [part for value in values for part in str(value).split("/")]


def _found(folder: Path, parts: Sequence[str], known: dict[Path, Names]) -> Path | None:
    """Return the file of such a name: to the letter, else in upper or lower case, with a version or an ending added.

    None where there is no such file, or several fit as well. `known` keeps the names of folders that were looked into.
    """
    exact = folder.joinpath(*parts)
    if exact.is_file():
        return exact
    for part in parts[:-1]:
        alike = _names(folder, known).get(part.casefold(), [])
        if part not in alike and len(alike) != 1:
            return None
        folder /= part if part in alike else alike[0]
    for ending in ADDED_ENDINGS:
        alike = _names(folder, known).get((parts[-1] + ending).casefold(), [])
        if alike:
            return folder / alike[0] if len(alike) == 1 else None
    return None


def _names(folder: Path, known: dict[Path, Names]) -> Names:
    """Return the names in a folder by what they are without letter case, version (ISO 9660) and a dot at the end."""
    if folder not in known:
        known[folder] = {}
        for entry in folder.iterdir() if folder.is_dir() else ():
            plain = entry.name.partition(";")[0].rstrip(".").casefold()
            known[folder].setdefault(plain, []).append(entry.name)
    return known[folder]
