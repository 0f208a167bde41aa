"""Files beside slices that are no DICOM: which of them might be what is left of a slice."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path

from medseg.errors import UnreadableFile
from medseg.io.files import leads_nowhere

DICOM_ENDINGS = frozenset({".dcm", ".ima"})
"""How names end that say of a file that it is DICOM."""

OTHER_ENDINGS = frozenset({
    ".txt", ".md", ".log", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".htm", ".css", ".js", ".pdf",
    ".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ico", ".nii", ".gz", ".zip", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr",
    ".bval", ".bvec", ".mat", ".py", ".sh", ".bat", ".exe", ".ini", ".inf", ".cfg", ".db", ".lnk", ".url", ".md5",
    ".sha256", ".sha512",
})  # fmt: skip
"""How names of files end that lie beside slices and are none."""

LEAST_BYTES = 132
"""The preamble of a DICOM file and its prefix (PS3.10 7.1): a shorter file is none, or what is left of one."""


def may_hold_slices(file: Path) -> bool:
    """Return whether to look into a file: it is there, or it is a link that leads nowhere, and may be a lost slice."""
    return file.is_file() or (leads_nowhere(file) and not _is_something_else(file))


def _is_something_else(file: Path) -> bool:
    ending = file.suffix.lower()
    return file.name.startswith(".") or file.name.upper() == "DICOMDIR" or ending in OTHER_ENDINGS


def lost_slices(others: Iterable[Path], folders: Container[Path]) -> list[UnreadableFile]:
    """Return an error for each of the files, none of which is DICOM, that might be what is left of a slice.

    That are those called .dcm and, in `folders`, which hold slices, those called .ima or too short to be DICOM. A
    DICOMDIR, hidden files, and those that other endings tell to be something else may lie beside slices.
    """
    found = []
    for file in others:
        ending, beside = file.suffix.lower(), file.parent in folders
        if _is_something_else(file):
            continue
        if ending == ".dcm" or (beside and ending in DICOM_ENDINGS):
            text = f"A file is called {ending} and is empty, damaged or no DICOM. Copy or export it again."
        elif beside and _size(file) < LEAST_BYTES:
            text = "A file beside the slices is empty or too short: a slice may be missing. Copy or export it again."
        else:
            continue
        found.append(UnreadableFile(text, path=file))
    return found


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # gone meanwhile
