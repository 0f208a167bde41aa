"""From finished rows of logits to the source grid, piece by piece: what is decided leaves memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.model.export import SCATTERED_VOXELS, Scattered, interpolate_slab, winners_slab
from medseg.process.resample import AxisPositions, parallel_axes
from medseg.process.resize import nearest
from medseg.volume import Grid

if TYPE_CHECKING:
    from torch import Tensor

Rows = Iterator[tuple[int, "Tensor"]]
"""Parts of the logits (C, I, J, K) as (first row along the streamed axis, part), in order; each begins with the last
row of the one before, so that every cell between two rows lies within one part."""

Index = tuple[Any, ...]
"""Voxels of the target as numpy takes them: three slices, or three arrays of indices."""

CHUNK_SCORES = 2**25
"""Scores of all classes that are interpolated at once where they are asked for: 128 MB of float32."""


@dataclass(frozen=True)
class Piece:
    """Voxels of the target that are decided: where they are, what wins there, and in chunks their scores (C, ...).

    `winners` are those of `export.winners_slab`. Use a piece before asking for the next: it is a view of a buffer.
    """

    index: Index
    winners: NDArray[np.uint16]
    scores: Callable[[], Iterator[tuple[Index, Tensor]]]


def pieces(
    rows: Rows, axis: int, grid: Grid, target: Grid, *, regions: bool = False, nearest_axes: Sequence[int] = ()
) -> Iterator[Piece]:
    """Yield the voxels of `target`, each once, when the rows along `axis` that they lie between are there.

    Along `nearest_axes` of `grid` scores are those of the nearest row, where the grids are parallel.
    """
    axes = parallel_axes(grid, target)
    if axes is None:
        return _across(rows, axis, grid, target, regions)
    axes = [nearest(one) if one.source_axis in nearest_axes else one for one in axes]
    return _along(rows, axis, grid, axes, regions)


def _along(rows: Rows, axis: int, grid: Grid, axes: Sequence[AxisPositions], regions: bool) -> Iterator[Piece]:
    along = next(place for place, one in enumerate(axes) if one.source_axis == axis)
    positions = np.clip(axes[along].positions, 0, grid.shape[axis] - 1)
    reached = -1
    for first, logits in rows:
        last = first + logits.shape[axis + 1] - 1
        planes = np.flatnonzero((positions > reached) & (positions <= last))
        reached = last
        if planes.size:
            here = [*axes]
            here[along] = replace(axes[along], positions=positions[planes] - first)
            turned = logits.permute(0, *(one.source_axis + 1 for one in axes))
            # Positions rise or fall, so the planes of a part are neighbors.
            winners = winners_slab(turned, here, regions=regions)
            yield Piece(_planes(along, planes), winners, partial(_scores_along, turned, here, along, planes))


def _scores_along(
    logits: Tensor, axes: Sequence[AxisPositions], along: int, planes: NDArray[np.intp]
) -> Iterator[tuple[Index, Tensor]]:
    plane = len(logits) * np.prod([len(one.positions) for place, one in enumerate(axes) if place != along])
    for some in np.array_split(np.arange(len(planes)), -(-len(planes) * plane // CHUNK_SCORES)):
        if some.size:
            here = [*axes]
            here[along] = replace(axes[along], positions=axes[along].positions[some])
            yield _planes(along, planes[some]), interpolate_slab(logits, here)


def _planes(along: int, planes: NDArray[np.intp]) -> Index:
    index = [slice(None)] * 3
    index[along] = slice(int(planes[0]), int(planes[-1]) + 1)
    return tuple(index)


def _across(rows: Rows, axis: int, grid: Grid, target: Grid, regions: bool) -> Iterator[Piece]:
    """Yield what lies between the rows where the target is turned or sheared: its planes cross them."""
    step = np.linalg.solve(grid.affine, target.affine)
    reached = -1
    for first, logits in rows:
        last = first + logits.shape[axis + 1] - 1
        slab = Scattered(logits, regions=regions)
        for index in _blocks(target.shape, step[axis], reached, last, grid.shape[axis]):
            positions = _positions(index, step)
            positions[axis] = positions[axis].clamp(0, grid.shape[axis] - 1) - first
            yield Piece(
                index, slab.winners(positions).cpu().numpy().view(np.uint16), partial(_scores, slab, index, positions)
            )
        reached = last


def _scores(slab: Scattered, index: Index, positions: Sequence[Tensor]) -> Iterator[tuple[Index, Tensor]]:
    size = max(1, CHUNK_SCORES // len(slab.cells.scores))
    for first in range(0, len(positions[0]), size):
        part = slice(first, first + size)
        yield tuple(one[part] for one in index), slab.scores([one[part] for one in positions])


def _blocks(
    shape: Sequence[int], step: NDArray[np.floating], reached: float, last: float, size: int
) -> Iterator[Index]:
    """Yield the indices of the target's voxels whose row, by `step` (4), lies above `reached` and not beyond `last`."""
    main = int(np.abs(step[:3]).argmax())
    rows = max(1, SCATTERED_VOXELS * shape[main] // int(np.prod(shape)))
    for start in range(0, shape[main], rows):
        parts = [np.arange(n) for n in shape]
        parts[main] = np.arange(start, min(start + rows, shape[main]))
        i, j, k = np.ix_(*(coefficient * part for coefficient, part in zip(step[:3], parts, strict=True)))
        if not _meet([i, j, k], step[3], reached, last, size):
            continue
        row = np.clip(i + j + k + step[3], 0, size - 1)
        found = np.nonzero((row > reached) & (row <= last))
        if found[0].size:
            yield tuple(part[place] for part, place in zip(parts, found, strict=True))


def _meet(terms: Sequence[NDArray[np.floating]], origin: float, reached: float, last: float, size: int) -> bool:
    low = np.clip(sum(float(term.min()) for term in terms) + origin, 0, size - 1)
    high = np.clip(sum(float(term.max()) for term in terms) + origin, 0, size - 1)
    return bool(high > reached and low <= last)


def _positions(index: Index, step: NDArray[np.floating]) -> list[Tensor]:
    i, j, k = (torch.from_numpy(part).double() for part in index)
    return [float(a) * i + float(b) * j + float(c) * k + float(origin) for a, b, c, origin in step[:3]]
