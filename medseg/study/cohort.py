"""Which studies lie in a folder: by the StudyInstanceUID of every file, whatever folders they lie in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from medseg.errors import MedsegError, UsageError
from medseg.io.dicom_lost import lost_slices
from medseg.io.files import reading
from medseg.io.structures import CONTENT, describe_structures
from medseg.study.archive import contents, is_archive, study_uid
from medseg.study.headers import all_headers, all_study_uids
from medseg.study.homes import homes, shared_uids
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

    Archives that hold different files of one study make one entry, which fails: see `check_one`.
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
    unseen = {error.path for error in problems}
    archives = {file for file in files if is_archive(file)}
    groups: dict[str, list[Path]] = {f"archive {_below(file, root)}": [file] for file in sorted(archives)}
    others = []
    stated: list[tuple[Path, str]] = []
    for file, found in all_study_uids([file for file in files if file not in archives]):
        if found is None:
            others.append(file)
        elif isinstance(found, MedsegError):
            problems.append(found)
        else:
            stated.append((file, found))
    for (file, _), uid in zip(stated, shared_uids(stated), strict=True):
        identity = f"study {uid}" if uid else f"folder {_below(file.parent, root)}"
        uids[identity] = uid
        groups.setdefault(identity, []).append(file)
    loose = [file for file, _ in stated]
    _add_problems(groups, [*problems, *lost_slices(others, loose)], root, unseen)
    studies = {uid: identity for identity, uid in uids.items() if uid}
    _join_archives(groups, studies, {archive: f"archive {_below(archive, root)}" for archive in sorted(archives)})
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


def _add_problems(
    groups: dict[str, list[Path]], problems: Sequence[MedsegError], root: Path, unseen: Container[Path | None]
) -> None:
    """Add what could not be read to the studies that it may belong to, or as a group of its own, but to no archive.

    What is `unseen`, since the system does not let look at it, belongs to those in its folder: others may be of
    another patient.
    """
    studies = [identity for identity, files in groups.items() if not is_archive(files[0])]
    paths = [error.path or root for error in problems]
    alone: dict[Path, str] = {}
    for path, places in zip(paths, homes(paths, [groups[identity] for identity in studies]), strict=True):
        is_folder = os.path.isdir(path)  # noqa: PTH112 - pathlib raises where nothing may be looked at
        own = f"path {_below(path, root)}"
        its = [studies[place] for place in places]
        if path in unseen and not (is_folder and path.parent != root):
            its = [identity for identity in its if path.parent in {file.parent for file in groups[identity]}]
        for identity in its or [own if is_folder else alone.setdefault(path.parent, own)]:
            groups.setdefault(identity, []).append(path)


def _join_archives(groups: dict[str, list[Path]], studies: dict[str, str], archives: dict[Path, str]) -> None:
    """Join archives to studies and archives beside them that hold other files of the same study; copies stay alone.

    All of them fail then: a part of a study is no study.
    """
    packed: dict[str, list[str]] = {}
    for archive, identity in archives.items():
        uid = study_uid(archive)
        same = groups.get(studies.get(uid, ""), [])
        if same and lost_slices([archive], same):
            groups[identity].append(same[0])
            same.append(archive)  # the rest of the study, or something else of it
        else:
            packed.setdefault(uid, []).append(identity)
    for uid, identities in packed.items():
        if uid and len({contents(groups[identity][0]) for identity in identities}) > 1:
            for identity in identities[1:]:
                groups[identities[0]] += groups.pop(identity)


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _shard(identity: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:8], "big") % count + 1
