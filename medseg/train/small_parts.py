"""Parts of labels so small that none of their voxels is left on the network's grid: found, kept if asked, and said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.model.plan import Plan
from medseg.process.resample import parallel_axes
from medseg.train.dataset_json import members_of, values_of
from medseg.volume import Grid

TOUCHING = np.ones((3, 3, 3))
"""Voxels of one part touch at a face, an edge or a corner."""

SHOWN = 10


@dataclass(frozen=True)
class LostParts:
    """The parts of a class that have no voxel left: for each the voxels (N, 3) of the new grid that it lies in.

    There were `parts` and `voxels` of the class in all; `lost_voxels` are those of the lost parts.
    """

    number: int
    parts: int
    voxels: int
    lost_voxels: int
    places: tuple[NDArray[np.int_], ...]

    @property
    def row(self) -> tuple[int, int, int, int, int]:
        """Class, lost parts, all parts, lost voxels and all voxels."""
        return self.number, len(self.places), self.parts, self.lost_voxels, self.voxels


def lost_parts(
    numbers: NDArray[np.integer], source: Grid, target: NDArray[np.integer], grid: Grid
) -> Iterator[LostParts]:
    """Yield, for each class that loses some, the parts of class numbers on a grid that `target`, on another, has not.

    A part is there if some voxel of its class is nearest to one of its voxels. Classes are numbered from 1.
    """
    axes = parallel_axes(source, grid)
    if axes is not None and all(axis.on_voxels for axis in axes) and numbers.size == target.size:
        return  # the same voxels
    for number, box in enumerate(ndimage.find_objects(np.maximum(numbers, 0)), start=1):
        if box is None:
            continue
        parts, count = ndimage.label(numbers[box] == number, structure=TOUCHING)
        start = np.asarray([part.start for part in box])
        left = np.zeros(count + 1, bool)
        left[0] = True
        for i, slab in enumerate(parts):  # slab by slab, so that the indices stay small
            j, k = np.nonzero(slab)
            at, inside = _nearest(np.stack([np.full(len(j), i), j, k], axis=1) + start, source, grid)
            left[slab[j, k][inside][target[tuple(at[inside].T)] == number]] = True
        if left.all():
            continue
        sizes, boxes = np.bincount(parts.ravel()), ndimage.find_objects(parts)
        places = []
        for one in np.flatnonzero(~left).tolist():
            part = boxes[one - 1]
            offset = start + [edge.start for edge in part]
            at, inside = _nearest(np.argwhere(parts[part] == one) + offset, source, grid)
            places.append(at[inside])
        yield LostParts(number, count, int(sizes[1:].sum()), int(sizes[~left].sum()), tuple(places))


def keep_parts(target: NDArray[np.integer], lost: Sequence[LostParts]) -> list[LostParts]:
    """Give each lost part the voxel of `target` that most of it lies in; return what lies outside, and stays lost.

    Background is taken first, and no voxel twice, unless there is no other.
    """
    taken: set[tuple[int, ...]] = set()
    outside = []
    for one in lost:
        for places in one.places:
            voxels, counts = np.unique(places, axis=0, return_counts=True)
            rows = sorted(zip(map(tuple, voxels.tolist()), counts.tolist(), strict=True), key=lambda row: -row[1])
            free = [at for at, _ in rows if at not in taken]
            chosen = next((at for at in free if target[at] == 0), next(iter(free or [at for at, _ in rows]), None))
            if chosen is not None:
                target[chosen] = one.number
                taken.add(chosen)
        gone = tuple(places for places in one.places if not len(places))
        if gone:
            outside.append(LostParts(one.number, one.parts, one.voxels, one.lost_voxels, gone))
    return outside


def warn_of_lost(cases: Sequence[tuple[str, NDArray[np.integer]]], plan: Plan) -> None:
    """Warn of what was lost, from the rows (`LostParts.row`) of each case by name."""
    values = values_of(plan.labels, plan.regions)
    members = members_of(plan.labels, plan.regions)
    names = [
        ", ".join(label.name for label in plan.regions or plan.labels if value in members[label.value])
        for value in values
    ]
    found = [(name, *row.tolist()) for name, rows in cases for row in rows]
    if not found:
        return
    found.sort(key=lambda row: -row[4] / row[5])  # labels of which nothing is left come first
    lines = [
        f"{name}: {names[number - 1]} ({parts} of {of_parts} parts, {voxels} of {of_voxels} voxels)"
        for name, number, parts, of_parts, voxels, of_voxels in found[:SHOWN]
    ]
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    warnings.warn(
        "Small parts of labels have no voxel at the spacing of the plan and are taught as background: "
        f"{'; '.join(lines)}{more}. Make spacing_mm in plan.json finer, or set keep_small there to true.",
        stacklevel=3,
    )


def _nearest(index: NDArray[np.int_], source: Grid, grid: Grid) -> tuple[NDArray[np.int_], NDArray[np.bool_]]:
    """Return the voxels of a grid nearest to voxels (N, 3) of another, and which of them lie inside."""
    at = np.rint(grid.to_index(source.to_world(index))).astype(int)
    return at, np.all((at >= 0) & (at < np.asarray(grid.shape)), axis=1)
