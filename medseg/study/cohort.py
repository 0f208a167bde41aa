"""Which studies lie in a folder: by the StudyInstanceUID of every file, whatever folders they lie in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from medseg.errors import MedsegError, UsageError
from medseg.io.dicom_lost import lost_slices
from medseg.io.files import reading
from medseg.io.structures import CONTENT, describe_structures
from medseg.study.archive import is_archive
from medseg.study.headers import all_headers, all_study_uids
from medseg.study.listing import listed


@dataclass(frozen=True)
class Entry:
    """One study to run: what tells it from all others, its StudyInstanceUID or "", and its files.

    A file or folder that cannot be read belongs to the studies beside it, and is an entry of its own where there are
    none: it ends as failed, and nothing is forgotten. `objects` are files of other studies that were drawn on its
    series, as far as somebody looked for them.
    """

    identity: str
    uid: str
    files: tuple[Path, ...]
    objects: tuple[Path, ...] = ()


def find_cohort(root: str | PathLike[str], shard: tuple[int, int] | None = None) -> list[Entry]:
    """Return the studies at or below a folder in the order of their paths; each .zip counts as one.

    `shard` (i, n), i from 1, gives the i-th of n parts; a hash of the study decides, so that it is the same everywhere.
    Raises UnreadableFile where the folder is missing, UsageError for a shard that is none.
    """
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise UsageError(f"A shard is i/n with i from 1 to n; here it is {shard[0]}/{shard[1]}.")
    root = Path(root)
    with reading(root):
        root.stat()
    problems: list[MedsegError] = []
    uids: dict[str, str] = {}
    files = listed(root, problems)
    archives = {file for file in files if is_archive(file)}
    groups: dict[str, list[Path]] = {f"archive {_below(file, root)}": [file] for file in sorted(archives)}
    others, folders = [], set()
    for file, uid in all_study_uids([file for file in files if file not in archives]):
        if uid is None:
            others.append(file)
        elif isinstance(uid, MedsegError):
            problems.append(uid)
        else:
            folders.add(file.parent)
            identity = f"study {uid}" if uid else f"folder {_below(file.parent, root)}"
            uids[identity] = uid
            groups.setdefault(identity, []).append(file)
    _add_problems(groups, [*problems, *lost_slices(others, folders)], root)
    entries = [Entry(identity, uids.get(identity, ""), tuple(files)) for identity, files in groups.items()]
    return [entry for entry in entries if shard is None or _shard(entry.identity, shard[1]) == shard[0]]


def with_objects(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries, each with the RTSTRUCT and SEG files of other studies that refer to series of it alone.

    Planning systems export contours as studies of their own. Nothing is looked for in archives.
    """
    homes: dict[str, set[str]] = {}
    drawn: dict[Path, str] = {}
    for entry in entries:
        for file, parts in all_headers(entry.files):
            for part in () if isinstance(parts, MedsegError) else parts:
                if part.modality in CONTENT:
                    drawn[file] = entry.identity
                else:
                    homes.setdefault(part.series_uid, set()).add(entry.identity)
    found: dict[str, list[Path]] = {}
    for file, own in drawn.items():
        try:
            described = describe_structures(file)
        except MedsegError:
            continue  # the study that it lies in fails of it
        referred = [homes.get(uid, set()) for uid in described.series_uids] if described else []
        if len(studies := set().union(*referred)) == 1 and own not in studies:
            found.setdefault(studies.pop(), []).append(file)
    return [replace(entry, objects=tuple(found.get(entry.identity, ()))) for entry in entries]


def _add_problems(groups: dict[str, list[Path]], problems: Sequence[MedsegError], root: Path) -> None:
    """Add what could not be read to the studies beside it, or as a group of its own, but to no archive."""
    folders = {
        identity: {file.parent for file in files} for identity, files in groups.items() if not is_archive(files[0])
    }
    for error in problems:
        path = error.path or root
        homes = [identity for identity, known in folders.items() if _beside(path, known, root)]
        for identity in homes or [f"path {_below(path, root)}"]:
            groups.setdefault(identity, []).append(path)
            if not _is_folder(path):  # folders side by side may be of two patients
                folders.setdefault(identity, set()).add(path.parent)


def _beside(path: Path, folders: set[Path], root: Path) -> bool:
    """Return whether what could not be read may belong to a study in these folders: in one, or side by side."""
    if path.parent in folders:
        return True
    return _is_folder(path) and path.parent != root and any(path.parent in folder.parents for folder in folders)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - pathlib raises where nothing may be looked at


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _shard(identity: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:8], "big") % count + 1
