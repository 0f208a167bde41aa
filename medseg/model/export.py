"""Class scores of the network grid turned into labels on the grid of the source.

Scores are interpolated linearly and then compared; comparing first and interpolating labels would leave stairs at
every border. Only where several classes meet is anything interpolated, and there only what can win (see `prune`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.model.prune import MIXED, Cells, ranked
from medseg.process.resample import AxisPositions, parallel_axes
from medseg.volume import Grid

ON_VOXEL_TOLERANCE = 1e-6
"""A position this close to a voxel center, in voxels, is that voxel; scores change no more than by rounding."""

BLOCK_VOXELS = 2**22
"""Target voxels that are looked through at once."""

BLOCK_SCORES = 2**23
"""Scores held at once where every class is interpolated: 32 MB of float32."""

PIECE_CLASSES = 2**19
"""Classes that may remain, summed over target voxels that are decided together: each takes up to 200 bytes."""

SAMPLE_VOXELS = 100
"""Voxels whose cells tell how many classes remain in a block."""

PRUNING_COST = 30
"""Time that a class takes which remains after pruning, search included, over that of interpolating one densely."""

Labels = NDArray[np.unsignedinteger]


def argmax_slab(logits: Tensor, axes: Sequence[AxisPositions]) -> NDArray[np.uint16]:
    """Return, for each target voxel, the class whose linearly interpolated score is the largest.

    `logits` is (C, I, J, K) float32 with its axes in the order of the target's, in any layout of memory; `axes` says
    where the target's voxels lie along each, in voxels of this slab. Beyond the outer voxels their scores go on.
    Of equal scores the lower class wins.
    """
    return _slab(logits, axes, regions=False)


def regions_slab(logits: Tensor, axes: Sequence[AxisPositions], order: Sequence[int]) -> Labels:
    """Return labels of regions that may overlap: order[r] where the interpolated score of region r is above 0.

    Later regions are painted over earlier ones; where there is none the label is 0. `logits` and `axes` are those of
    `argmax_slab`.
    """
    return _painted(_slab(logits, axes, regions=True), order)


def argmax_onto(logits: Tensor, grid: Grid, target: Grid) -> NDArray[np.uint16]:
    """Return what `argmax_slab` does for logits (C, I, J, K) on `grid`; `target` may be turned or sheared."""
    return _onto(logits, grid, target, regions=False)


def regions_onto(logits: Tensor, grid: Grid, target: Grid, order: Sequence[int]) -> Labels:
    """Return what `regions_slab` does for logits (C, I, J, K) on `grid`; `target` may be turned or sheared."""
    return _painted(_onto(logits, grid, target, regions=True), order)


def interpolate_slab(logits: Tensor, axes: Sequence[AxisPositions]) -> Tensor:
    """Return the scores of every class at the target's voxels; `logits` and `axes` are those of `argmax_slab`."""
    return _Parallel.of(logits, axes).interpolated(logits)


@dataclass(frozen=True)
class _Parallel:
    """Target voxels along the axes of the scores: for each axis the first voxels of their cells, and fractions."""

    size: tuple[int, ...]
    wide: tuple[bool, ...]
    low: tuple[Tensor, ...]
    fraction: tuple[Tensor, ...]

    @classmethod
    def of(cls, scores: Tensor, axes: Sequence[AxisPositions]) -> _Parallel:
        size = tuple(scores.shape[1:])
        inside = [_inside(torch.from_numpy(axis.positions), n) for axis, n in zip(axes, size, strict=True)]
        wide = tuple(bool((positions != positions.round()).any()) for positions in inside)
        low, fraction = zip(*map(_split, inside, size, wide), strict=True)
        return cls(size, wide, *(tuple(table.to(scores.device) for table in part) for part in (low, fraction)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(low) for low in self.low)

    def rows(self, first: int, stop: int) -> _Parallel:
        low, fraction = self.low[0][first:stop], self.fraction[0][first:stop]
        return replace(self, low=(low, *self.low[1:]), fraction=(fraction, *self.fraction[1:]))

    def spread(self, cells: Tensor) -> Tensor:
        """Return the value of the cell that each target voxel lies in."""
        for axis in (2, 1, 0):
            cells = cells.index_select(axis, self.low[axis])
        return cells

    def locate(self, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for flat indices of target voxels, their cells and fractions as `Cells.decide` takes them."""
        index = torch.unravel_index(voxels, self.shape)
        low = [table[i] for table, i in zip(self.low, index, strict=True)]
        return _flat(low, self.size), torch.stack([table[i] for table, i in zip(self.fraction, index, strict=True)])

    def interpolated(self, scores: Tensor) -> Tensor:
        result = torch.empty((len(scores), *self.shape), device=scores.device)
        # The axis that shrinks most comes first, and class after class: temporary arrays stay small.
        order = sorted(range(3), key=lambda axis: self.shape[axis] / self.size[axis])
        for part, out in zip(scores, result, strict=True):
            image = part
            for axis in order:
                low, fraction = self.low[axis], self.fraction[axis]
                near = image.index_select(axis, low)
                if self.wide[axis]:
                    near.lerp_(image.index_select(axis, low + 1), fraction.view(-1, *[1] * (2 - axis)))
                image = near
            out.copy_(image)
        return result


@dataclass(frozen=True)
class _Turned:
    """Target voxels anywhere: `step` (4, 4) takes their index to the index of the scores."""

    size: tuple[int, ...]
    shape: tuple[int, ...]
    step: NDArray[np.floating]

    @property
    def wide(self) -> tuple[bool, ...]:
        return tuple(size > 1 for size in self.size)

    def spread(self, cells: Tensor) -> Tensor:
        """Return the value of the cell that each target voxel lies in."""
        result = cells.new_empty(prod(self.shape))
        for first in range(0, len(result), BLOCK_VOXELS // 4):
            part = result[first : first + BLOCK_VOXELS // 4]
            place, _ = self.locate(torch.arange(first, first + len(part), device=cells.device))
            part.copy_(cells.take(place))
        return result.view(self.shape)

    def locate(self, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for flat indices of target voxels, their cells and fractions as `Cells.decide` takes them."""
        i, j, k = torch.unravel_index(voxels.cpu(), self.shape)
        positions = [float(a) * i + float(b) * j + float(c) * k + float(origin) for a, b, c, origin in self.step[:3]]
        inside = map(_inside, positions, self.size)
        low, fraction = zip(*map(_split, inside, self.size, self.wide), strict=True)
        return _flat(low, self.size).to(voxels.device), torch.stack(fraction).to(voxels.device)


def _inside(positions: Tensor, size: int) -> Tensor:
    inside = positions.clamp(0, size - 1)
    nearest = inside.round()
    return torch.where((inside - nearest).abs() < ON_VOXEL_TOLERANCE, nearest, inside)


def _split(inside: Tensor, size: int, wide: bool) -> tuple[Tensor, Tensor]:
    low = inside.floor().clamp(max=size - 1 - wide)
    return low.long(), (inside - low).float()


def _flat(index: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    i, j, k = index
    return (i * size[1] + j) * size[2] + k


def _slab(logits: Tensor, axes: Sequence[AxisPositions], *, regions: bool) -> NDArray[np.uint16]:
    # In the order of memory, whatever the order of the target's axes.
    order = sorted(range(3), key=lambda axis: -logits.stride(axis + 1))
    scores = logits.permute(0, *(axis + 1 for axis in order))
    labels = _decided(scores, _Parallel.of(scores, [axes[axis] for axis in order]), regions=regions)
    return labels.transpose(np.argsort(order))


def _onto(logits: Tensor, grid: Grid, target: Grid, *, regions: bool) -> NDArray[np.uint16]:
    axes = parallel_axes(grid, target)
    if axes is not None:
        return _slab(logits.permute(0, *(axis.source_axis + 1 for axis in axes)), axes, regions=regions)
    step = np.linalg.solve(grid.affine, target.affine)
    return _decided(logits, _Turned(grid.shape, target.shape, step), regions=regions)


def _decided(scores: Tensor, where: _Parallel | _Turned, *, regions: bool) -> NDArray[np.uint16]:
    cells = Cells.of(scores.detach(), where.wide, regions=regions)
    labels = where.spread(cells.common())
    rows = max(1, BLOCK_VOXELS // labels[0].numel())
    for first in range(0, len(labels), rows):
        _decide_rows(labels, first, min(first + rows, len(labels)), cells, where)
    return labels.cpu().numpy().view(np.uint16)


def _decide_rows(labels: Tensor, first: int, stop: int, cells: Cells, where: _Parallel | _Turned) -> None:
    plane = labels[0].numel()
    voxels = (labels[first:stop] == MIXED).flatten().nonzero()[:, 0] + first * plane
    if not len(voxels):
        return
    kept = cells.kept(where.locate(voxels[:: 1 + len(voxels) // SAMPLE_VOXELS])[0])
    dense = len(cells.scores) * (stop - first) * plane
    if isinstance(where, _Parallel) and PRUNING_COST * kept * len(voxels) > dense:
        rows = max(1, BLOCK_SCORES // (len(cells.scores) * plane))
        for row in range(first, stop, rows):
            end = min(row + rows, stop)
            labels[row:end] = ranked(where.rows(row, end).interpolated(cells.scores), regions=cells.regions)[0]
        return
    for piece in torch.split(voxels, max(1, int(PIECE_CLASSES / kept))):
        labels.view(-1)[piece] = cells.decide(*where.locate(piece)).to(labels.dtype)


def _painted(winners: NDArray[np.uint16], order: Sequence[int]) -> Labels:
    values = np.array([0, *order])
    return values.astype(np.min_scalar_type(int(values.max())))[winners]
