"""From a folder, a DICOMDIR or an archive to studies, each with its stacks of slices and a verdict on every one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np

from medseg.errors import MedsegError
from medseg.io.dicom_geometry import SAME_POSITION_MM, parallel
from medseg.io.dicom_lost import lost_slices
from medseg.io.dicom_passes import find_passes
from medseg.io.dicom_pixels import PIXEL_REASONS
from medseg.io.dicom_series import Series, make_series, nameless_slices
from medseg.io.dicom_slice import VARIANTS, Slice
from medseg.io.files import reading
from medseg.study.headers import all_headers
from medseg.study.homes import homes, shared_uids
from medseg.study.listing import listed

IMAGE_TYPE = VARIANTS.index("ImageType")


@dataclass(frozen=True, eq=False)
class Study:
    """One study: every stack of slices in it, every DICOM file of it, and what could not be read beside them.

    A study with `problems` may lack a slice at its end, where no gap would tell. Files that state no `uid` belong to
    the study in their folder, where there is one; else those of one folder make a study, whose `uid` is "".
    """

    uid: str
    series: tuple[Series, ...]
    files: tuple[Path, ...]
    problems: tuple[MedsegError, ...] = ()


def find_studies(path: str | PathLike[str]) -> list[Study]:
    """Return the studies at or below a folder, in a DICOMDIR or in a file, read from headers only.

    Files count whatever they are called. Each series is split into stacks, see `split`. What cannot be read is listed
    with the studies that it may belong to, see `homes`, or as a study of its own.
    Raises UnreadableFile where the path itself is missing, or a DICOMDIR is damaged.
    """
    with reading(path):
        Path(path).stat()
    problems: list[MedsegError] = []
    return read_studies(listed(Path(path), problems), problems)


def read_studies(files: Sequence[Path], problems: Sequence[MedsegError] = ()) -> list[Study]:
    """Return the studies that these files belong to, as `find_studies` does; `problems` are those met before."""
    problems = [*problems]
    slices: list[Slice] = []
    others = []
    for file, parts in all_headers(files):
        if isinstance(parts, MedsegError):
            problems.append(parts)
            continue
        if not parts:
            others.append(file)
        slices += parts
    problems += [*lost_slices(others, [part.path for part in slices]), *nameless_slices(slices)]
    found: dict[str, list[Slice]] = {}
    for part, uid in zip(slices, shared_uids([(part.path, part.study_uid) for part in slices]), strict=True):
        found.setdefault(uid or str(part.path.parent), []).append(part)
    return [*_with_problems([_study(slices) for slices in found.values()], problems)]


def split(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Return the slices of one series as stacks that belong together.

    Slices are parted by what they are (localizer or not, an image or not), frame of reference, matrix, orientation and
    pixel spacing. Where positions then repeat or slices of several stacks interleave, they are parted by image type,
    echo, inversion time, diffusion, time, stack or acquisition, whichever tells them apart. A scan in steps that differ
    from one end to the other stays one stack: half of it would not be what was scanned. A slice that cannot be read
    stays with those that it is like otherwise, since without it their stack would be short.
    """
    stacks: list[list[Slice]] = []
    for part in sorted(slices, key=lambda part: part.problem is not None):
        home = next((stack for stack in stacks if _alike(stack[0], part)), None)
        home = home or next((stack for stack in stacks if _may_lack(stack[0], part)), None)
        if home is None:
            stacks.append([part])
        else:
            home.append(part)
    return [piece for stack in stacks for piece in _untangled(stack)]


def _study(slices: Sequence[Slice]) -> Study:
    series: dict[tuple[str, Path | None], list[Slice]] = {}
    uids = shared_uids([(part.path, part.series_uid) for part in slices])
    for part, uid in zip(slices, uids, strict=True):
        series.setdefault((uid, None if uid else part.path.parent), []).append(part)
    stacks = [make_series(stack) for parts in series.values() for stack in split(parts)]
    uid = next(filter(None, (part.study_uid for part in slices)), "")
    return Study(uid, tuple(stacks), tuple(dict.fromkeys(part.path for part in slices)))


def _with_problems(studies: Sequence[Study], problems: Sequence[MedsegError]) -> Iterator[Study]:
    homeless = []
    beside: list[list[MedsegError]] = [[] for _ in studies]
    places = homes([error.path or Path() for error in problems], [study.files for study in studies])
    for error, its in zip(problems, places, strict=True):
        for place in its:
            beside[place].append(error)
        if not its:
            homeless.append(error)
    for study, found in zip(studies, beside, strict=True):
        yield replace(study, problems=tuple(found))
    for error in homeless:
        yield Study("", (), (error.path,) if error.path else (), (error,))


def _alike(first: Slice, other: Slice) -> bool:
    if _kind(first) != _kind(other) or _differ(first.frame_of_reference_uid, other.frame_of_reference_uid):
        return False
    if _differ(first.modality, other.modality):
        return False
    if first.plane is None or other.plane is None:
        return first.plane is other.plane
    return parallel(first.plane, other.plane, first.shape)


def _may_lack(first: Slice, broken: Slice) -> bool:
    """Return whether a slice that cannot be read is one of a stack, by all that may not be what is wrong with it."""
    if first.problem is not None or broken.problem is None or broken.problem.reason == "not_an_image":
        return False
    same = first.is_localizer == broken.is_localizer and first.modality == broken.modality
    return same and first.variants[IMAGE_TYPE] == broken.variants[IMAGE_TYPE]


def _kind(part: Slice) -> tuple[object, ...]:
    # A slice whose pixels cannot be read belongs to the others: without it they are no whole scan.
    reason = part.problem.reason if part.problem and part.problem.reason not in PIXEL_REASONS else ""
    return part.is_localizer, reason, part.shape


def _differ(first: str, other: str) -> bool:
    """Return whether two slices state different values; some slices of a series leave one blank."""
    return bool(first and other and first != other)


def _untangled(stack: list[Slice]) -> list[list[Slice]]:
    reason = _reason(stack)
    if reason == "duplicate_positions":
        most = _most_at_one_position(stack)
        for parts in _partings(stack):
            if len(parts) <= most and max(map(_most_at_one_position, parts)) < most:
                return [piece for part in parts for piece in _untangled(part)]
    if reason == "interleaved":
        slices = make_series(stack).slices
        passes = find_passes(slices, np.array([part.plane for part in slices]))
        if passes and passes.are_certain:
            return [piece for part in passes.parts for piece in _untangled(part)]
    return [stack]


def _reason(stack: Sequence[Slice]) -> str:
    refusal = make_series(stack).refusal
    return refusal.reason if refusal else ""


def _partings(stack: Sequence[Slice]) -> Iterator[list[list[Slice]]]:
    """Yield the stack parted by each header element that is not the same in all of it."""
    for place in range(len(VARIANTS)):
        parts: dict[str, list[Slice]] = {}
        for part in stack:
            parts.setdefault(part.variants[place], []).append(part)
        if len(parts) > 1:
            yield [*parts.values()]


def _most_at_one_position(stack: Iterable[Slice]) -> int:
    """Return how many parallel slices lie at one position along their normal, as `stack_problem` sees it."""
    planes = np.array([part.plane for part in stack if part.plane is not None])
    if not len(planes):
        return 0
    heights_mm = np.sort(planes[:, :3, 3] @ planes[0, :3, 2])
    ends = np.flatnonzero(np.diff(heights_mm) > SAME_POSITION_MM) + 1
    return int(np.diff([0, *ends, len(heights_mm)]).max())
