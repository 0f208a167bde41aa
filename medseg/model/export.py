"""Class scores of the network grid turned into labels on the grid of the source.

Scores are interpolated linearly and then compared; comparing first and interpolating labels would leave stairs at
every border. Only where several classes meet is anything interpolated, and there only what can win (see `contenders`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.model.contenders import MIXED, Cells, ranked, unraveled
from medseg.process.resample import AxisPositions

ON_VOXEL_TOLERANCE = 1e-6
"""A position this close to a voxel center, in voxels, is that voxel; scores change no more than by rounding."""

BLOCK_VOXELS = 2**22
"""Target voxels that are looked through at once."""

SCATTERED_VOXELS = 2**20
"""Target voxels of a turned grid that are decided at once: their positions take 24 bytes each."""

BLOCK_SCORES = 2**23
"""Scores held at once where every class is interpolated: 32 MB of float32."""

PIECE_CLASSES = 2**19
"""Classes that may remain, summed over target voxels that are decided together: each takes up to 200 bytes."""

SAMPLE_VOXELS = 100
"""Voxels whose cells tell how many classes remain in a block."""

PRUNING_COST = 30
"""Time that a class takes which remains after pruning, search included, over that of interpolating one densely."""


def winners_slab(logits: Tensor, axes: Sequence[AxisPositions], *, regions: bool = False) -> NDArray[np.uint16]:
    """Return, for each target voxel, the class whose linearly interpolated score is the largest.

    `logits` is (C, I, J, K) float32 with its axes in the order of the target's, in any layout of memory; `axes` says
    where the target's voxels lie along each, in voxels of this slab. Beyond the outer voxels their scores go on.
    Of equal scores the lower class wins. With `regions`, which may overlap, the result is 1 + the last region whose
    score is above 0, or 0 where there is none.
    """
    # In the order of memory, whatever the order of the target's axes.
    order = sorted(range(3), key=lambda axis: -logits.stride(axis + 1))
    scores = logits.permute(0, *(axis + 1 for axis in order))
    labels = _decided(scores, _Parallel.of(scores, [axes[axis] for axis in order]), regions=regions)
    return labels.transpose(np.argsort(order))


def interpolate_slab(logits: Tensor, axes: Sequence[AxisPositions]) -> Tensor:
    """Return the scores of every class at the target's voxels; `logits` and `axes` are those of `winners_slab`."""
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
        index = unraveled(voxels, self.shape)
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


class Scattered:
    """The scores (C, I, J, K) of a slab, asked at positions anywhere in it, in voxels: three tensors (m)."""

    def __init__(self, logits: Tensor, *, regions: bool = False):
        self.size = tuple(logits.shape[1:])
        self.cells = Cells.of(logits.detach(), tuple(size > 1 for size in self.size), regions=regions)
        self.common = self.cells.common()

    def winners(self, positions: Sequence[Tensor]) -> Tensor:
        """Return int16 (m) what `winners_slab` finds."""
        place, fraction = self._locate(positions)
        result = self.common.take(place)
        mixed = (result == MIXED).nonzero()[:, 0]
        if len(mixed):
            kept = self.cells.kept(place[mixed[:: 1 + len(mixed) // SAMPLE_VOXELS]])
            for piece in torch.split(mixed, max(1, int(PIECE_CLASSES / kept))):
                result[piece] = self.cells.decide(place[piece], fraction[:, piece]).to(result.dtype)
        return result

    def scores(self, positions: Sequence[Tensor]) -> Tensor:
        """Return (C, m) the interpolated scores of every class."""
        return self.cells.interpolated(*self._locate(positions))

    def _locate(self, positions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        device = self.common.device
        inside = map(_inside, positions, self.size)
        low, fraction = zip(*map(_split, inside, self.size, self.cells.wide), strict=True)
        return _flat(low, self.size).to(device), torch.stack(fraction).to(device)


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


def _decided(scores: Tensor, where: _Parallel, *, regions: bool) -> NDArray[np.uint16]:
    cells = Cells.of(scores.detach(), where.wide, regions=regions)
    labels = where.spread(cells.common())
    rows = max(1, BLOCK_VOXELS // labels[0].numel())
    for first in range(0, len(labels), rows):
        _decide_rows(labels, first, min(first + rows, len(labels)), cells, where)
    return labels.cpu().numpy().view(np.uint16)


def _decide_rows(labels: Tensor, first: int, stop: int, cells: Cells, where: _Parallel) -> None:
    plane = labels[0].numel()
    voxels = (labels[first:stop] == MIXED).flatten().nonzero()[:, 0] + first * plane
    if not len(voxels):
        return
    kept = cells.kept(where.locate(voxels[:: 1 + len(voxels) // SAMPLE_VOXELS])[0])
    dense = len(cells.scores) * (stop - first) * plane
    if PRUNING_COST * kept * len(voxels) > dense:
        rows = max(1, BLOCK_SCORES // (len(cells.scores) * plane))
        for row in range(first, stop, rows):
            end = min(row + rows, stop)
            labels[row:end] = ranked(where.rows(row, end).interpolated(cells.scores), regions=cells.regions)[0]
        return
    for piece in torch.split(voxels, max(1, int(PIECE_CLASSES / kept))):
        labels.view(-1)[piece] = cells.decide(*where.locate(piece)).to(labels.dtype)
