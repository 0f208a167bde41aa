"""Whether slices are several passes over one region, such as the phases of a contrast agent, that interleave.

Slices of two passes that lie half a step apart have equal steps, as those of one scan do. What tells is what the
headers say of their contents, or of when they were taken. A single MR scan is taken in passes, too, every other slice
first: there the slices of one pass leave room for those of the other, so thickness decides. It decides, too, where
slices were merely made in passes, as by several computers that reconstruct them in turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.io.dicom_geometry import POSITION_TOLERANCE_MM
from medseg.io.dicom_slice import VARIANTS, Slice

LEAST_PASS = 3
"""A pass has so many slices: two always have equal steps."""

WHEN = frozenset(
    {
        *("TriggerTime", "FrameReferenceTime", "AcquisitionNumber", "AcquisitionTime", "AcquisitionDateTime"),
        "ContentTime",
    }
)
"""Elements that say when a slice was taken, or made (ContentTime), and nothing of what it shows."""

COUNTS = frozenset({"AcquisitionNumber", "InstanceNumber"})
"""What goes through twice for two passes, and once for one scan, whatever the order in which its slices were taken."""

OVERLAP = 1.1
"""Slices of one MR scan are thicker than their step by no more than this factor, unless they overlap on purpose."""


class Passes(NamedTuple):
    """The slices of each pass, in the order given, and the element that tells them apart.

    They are uncertain where only times do, and the slices are numbered as one scan.
    """

    element: str
    parts: list[list[Slice]]
    are_certain: bool


def find_passes(slices: Sequence[Slice], planes: NDArray[np.float64]) -> Passes | None:
    """Return the passes that slices with ordered planes (n, 4, 4) are, each with equal steps; None for one scan."""
    if len(slices) < 2 * LEAST_PASS:
        return None
    heights_mm = planes[:, :3, 3] @ planes[0, :3, 2]
    even = _is_even(heights_mm)
    step_mm = float(heights_mm[-1] - heights_mm[0]) / (len(slices) - 1)
    for element, parts in _partings(slices, heights_mm):
        if even and not _counts(element, slices[0], step_mm):
            continue
        if all(_is_even(heights_mm[part]) for part in parts) and _overlap(parts, heights_mm):
            found = [[slices[n] for n in sorted(part)] for part in parts]
            return Passes(element, found, element not in WHEN or not _are_numbered_in_order(slices))
    return None


def may_be_passes(slices: Sequence[Slice], planes: NDArray[np.float64]) -> bool:
    """Return whether any element parts slices with ordered planes (n, 4, 4) into such that reach over each other."""
    heights_mm = planes[:, :3, 3] @ planes[0, :3, 2]
    step_mm = float(heights_mm[-1] - heights_mm[0]) / (len(slices) - 1)
    return any(
        _overlap(parts, heights_mm) for element, parts in _by_value(slices) if _counts(element, slices[0], step_mm)
    )


def _counts(element: str, first: Slice, step_mm: float) -> bool:
    """Return whether it tells passes from one scan that an element differs between slices that interleave."""
    if element not in WHEN | COUNTS or (first.modality != "MR" and element != "ContentTime"):
        return True
    return element in COUNTS if math.isnan(first.extent_mm) else first.extent_mm > OVERLAP * step_mm


def _partings(slices: Sequence[Slice], heights_mm: NDArray[np.float64]) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield each element, and what it parts the slices into: places of slices, in parts of LEAST_PASS or more."""
    found = [*_by_value(slices)]
    for place, element in enumerate(VARIANTS):
        if element in WHEN and all(part.variants[place] for part in slices):
            found.append((element, _by_order(heights_mm, [_sortable(part.variants[place]) for part in slices])))
    if len({part.path for part in slices}) == 1:
        found.append(("InstanceNumber", _by_order(heights_mm, [(part.frame,) for part in slices])))
    elif not any(math.isnan(part.instance_number) for part in slices):
        found.append(("InstanceNumber", _by_order(heights_mm, [(p.instance_number, p.frame) for p in slices])))
    for element, parts in found:
        if len(parts) > 1 and min(map(len, parts)) >= LEAST_PASS:
            yield element, parts


def _are_numbered_in_order(slices: Sequence[Slice]) -> bool:
    steps = np.diff([part.instance_number for part in slices])
    return bool((steps > 0).all() or (steps < 0).all())


def _by_value(slices: Sequence[Slice]) -> Iterator[tuple[str, list[list[int]]]]:
    for place, element in enumerate(VARIANTS):
        parts: dict[str, list[int]] = {}
        for number, part in enumerate(slices):
            parts.setdefault(part.variants[place], []).append(number)
        if len(parts) > 1:
            yield element, [*parts.values()]


def _by_order(heights_mm: NDArray[np.float64], keys: Sequence[tuple[float | str, ...]]) -> list[list[int]]:
    """Return the slices in the order of their keys, parted wherever the step from one to the next changes."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    runs: list[list[int]] = []
    step_mm: float | None = None
    for before, number in zip([-1, *order], order, strict=False):
        step = heights_mm[number] - heights_mm[before]
        if not runs or (step_mm is not None and abs(step - step_mm) > 2 * POSITION_TOLERANCE_MM):
            runs.append([number])
            step_mm = None
        else:
            runs[-1].append(number)
            step_mm = step
    return runs


def _sortable(value: str) -> tuple[float | str, ...]:
    """Return a key by which numbers come in their order, and times and dates as texts."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _is_even(heights_mm: NDArray[np.float64]) -> bool:
    steps_mm = np.abs(np.diff(np.sort(heights_mm)))
    return bool(np.ptp(steps_mm) <= 2 * POSITION_TOLERANCE_MM and steps_mm.min() > POSITION_TOLERANCE_MM)


def _overlap(parts: Sequence[Sequence[int]], heights_mm: NDArray[np.float64]) -> bool:
    """Return whether two of the parts reach over each other along the normal."""
    ends = sorted((heights_mm[part].min(), heights_mm[part].max()) for part in map(list, parts))
    highest = -math.inf
    for low, high in ends:
        if low < highest:
            return True
        highest = max(highest, high)
    return False
