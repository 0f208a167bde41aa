"""Which studies a file or folder that cannot be read may belong to, by where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def shared_uids(stated: Sequence[tuple[Path, str]]) -> list[str]:
    """Return for each file the UID, of study or series, that it states, or if blank the only one in its folder.

    It stays blank where the folder has none, or several.
    """
    if all(uid for _, uid in stated):
        return [uid for _, uid in stated]
    beside: dict[Path, set[str]] = {}
    for file, uid in stated:
        beside.setdefault(file.parent, set()).update({uid} - {""})
    only = {folder: next(iter(uids)) for folder, uids in beside.items() if len(uids) == 1}
    return [uid or only.get(file.parent, "") for file, uid in stated]


def homes(paths: Sequence[Path], studies: Sequence[Iterable[Path]]) -> list[list[int]]:
    """Return for each path the places in `studies` of those that it may belong to; `studies` holds their files.

    Those are the studies in the same folder. Where none is, those in the nearest folder above: the only one there, or
    those that lie in several of its folders, since then a folder is a series and no study. A folder may belong to
    a study in the folder around it, too.
    """
    if not paths:
        return []
    around: dict[Path, dict[int, set[Path]]] = {}
    for place, files in enumerate(studies):
        for folder in {file.parent for file in files}:
            around.setdefault(folder, {}).setdefault(place, set()).add(folder)
            for inner, outer in zip((folder, *folder.parents), folder.parents, strict=False):
                around.setdefault(outer, {}).setdefault(place, set()).add(inner)
    return [_homes(path, around) for path in paths]


def _homes(path: Path, around: dict[Path, dict[int, set[Path]]]) -> list[int]:
    folder = next((folder for folder in (path, *path.parents) if folder in around), path)
    near = around.get(folder, {})
    direct = [place for place, inner in near.items() if folder in inner]
    if direct and folder == path.parent:
        return direct
    return [place for place, inner in near.items() if len(near) == 1 or len(inner - {folder}) > 1]
