"""Which class wins between voxels, found from the few classes that can.

A target voxel lies in a cell of the scores' grid: between two voxel centers along each axis, or on one along an axis
where every target voxel meets a center. Linear interpolation weighs a cell's corners by numbers that are never
negative and sum to 1, so it keeps every inequality that holds at all of them. A cell whose corners have one winner is
done. In any other let W be the classes that win at some corner: the largest of them is nowhere below their mean, so
a class below that mean at every corner wins nowhere in the cell. Comparing with the smallest of W would be wrong: with
A = (10, -10), B = (-10, 10) and C = (5, 5) at two corners, C wins in the middle.

Regions overlap: each has a score that counts by its sign, and the last one above 0 wins. A region that is below 0 at
every corner wins nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

MIXED = -1
"""Stands for the winner of a cell whose corners have several."""

CACHED_SCORES = 2**17
"""Scores of one class that are compared at once; the processor's cache holds them until the next class comes."""

ROUNDING = 1e-6
"""Relative error that the float32 mean of a few numbers above 0 does not reach."""


@dataclass(frozen=True)
class Cells:
    """Scores (C, I, J, K) cut into cells that span two voxels along the axes that are `wide`.

    `winner` and `second` are those of the voxels, as `ranked` finds them. A cell goes by the flat index of its first
    voxel in (I, J, K).
    """

    scores: Tensor
    regions: bool
    wide: tuple[bool, ...]
    winner: Tensor
    second: Tensor

    @classmethod
    def of(cls, scores: Tensor, wide: tuple[bool, ...], *, regions: bool) -> Cells:
        """Return the cells of scores in any layout of memory, of classes or of `regions`."""
        return cls(scores, regions, wide, *ranked(scores, regions=regions))

    def common(self) -> Tensor:
        """Return (I, J, K) what is the winner at all corners of the cell that begins at a voxel, or MIXED.

        At the last voxel of a wide axis, where no cell begins, the value means nothing.
        """
        common = self.winner.clone()
        for axis, wide in enumerate(self.wide):
            if wide:
                cells = common.shape[axis] - 1
                low, high = common.narrow(axis, 0, cells), common.narrow(axis, 1, cells)
                low.copy_(torch.where(low == high, low, MIXED))
        return common

    def decide(self, place: Tensor, fraction: Tensor) -> Tensor:
        """Return the winners (m) in the cells `place` (m), at the `fraction` (3, m) of each axis."""
        cells, cell = numbered(place)
        address, winner = self._corners(cells)
        if self.regions:
            return self._contest(address, winner, cell, fraction)
        low, high, lead, is_duel = self._duel(cells, address, winner)
        ahead = self._interpolated(lead.index_select(1, cell), fraction) >= 0
        result = torch.where(ahead, low[cell], high[cell])
        others = (~is_duel).nonzero()[:, 0]
        if len(others):
            number = torch.full_like(cells, -1)
            number[others] = torch.arange(len(others), device=cells.device)
            number = number[cell]
            voxels = (number >= 0).nonzero()[:, 0]
            corners = address.index_select(1, others), winner.index_select(1, others)
            result[voxels] = self._contest(*corners, number[voxels], fraction.index_select(1, voxels))
        return result

    def interpolated(self, place: Tensor, fraction: Tensor) -> Tensor:
        """Return the scores (C, m) of every class in the cells `place` (m), at the `fraction` (3, m) of each axis."""
        address, _ = self._corners(place)
        scores = [self._interpolated(self._scores(number, address), fraction) for number in range(len(self.scores))]
        return torch.stack(scores)

    def kept(self, place: Tensor) -> float:
        """Return how many classes remain in the cells `place`, on average."""
        count, _, _ = self._remaining(*self._corners(place))
        return float(count.float().mean())

    def _duel(self, cells: Tensor, address: Tensor, winner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the lowest and the highest winner of each cell, by how much the lower leads, and whether they are all.

        No other class wins where, at each corner, one of the two is first, and the second largest score either is that
        of the other or lies below their mean. Nearly all cells are such, and other classes need not be looked at.
        """
        low, high = reduce(torch.minimum, winner), reduce(torch.maximum, winner)
        lows, highs = self._scores(low, address), self._scores(high, address)
        second = self.second.take(self._places(cells))
        others_below = (second == torch.minimum(lows, highs)) | (2 * second < lows + highs)
        is_duel = ((winner == low) | (winner == high)) & others_below
        return low, high, lows - highs, reduce(torch.bitwise_and, is_duel)

    def _contest(self, address: Tensor, winner: Tensor, cell: Tensor, fraction: Tensor) -> Tensor:
        """Return the winners at voxels in the cells numbered `cell`, by trying class after class that remains."""
        count, classes, scores = self._remaining(address, winner)
        first = count.cumsum(0) - count
        result = torch.zeros_like(cell)
        bar = torch.full_like(fraction[0], 0 if self.regions else -torch.inf)
        voxels = torch.arange(len(cell), device=cell.device)
        for rank in range(int(count.max()) if len(cell) else 0):
            entry = first[cell] + rank
            score = self._interpolated(scores.index_select(1, entry), fraction)
            better = (score > bar[voxels]).nonzero()[:, 0]
            result[voxels[better]] = classes[entry[better]] + int(self.regions)
            if not self.regions:
                bar[voxels[better]] = score[better]
            more = (count[cell] > rank + 1).nonzero()[:, 0]
            voxels, cell, fraction = voxels[more], cell[more], fraction.index_select(1, more)
        return result

    def _remaining(self, address: Tensor, winner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many classes remain in each cell, and cell after cell which ones, with their corner scores."""
        floor = torch.zeros_like(address, dtype=torch.float32) if self.regions else self._mean(address, winner)
        keep = [reduce(torch.bitwise_or, self._scores(n, address) >= floor) for n in range(len(self.scores))]
        cell, number = torch.stack(keep, dim=1).nonzero().unbind(dim=1)
        count = torch.bincount(cell, minlength=address.shape[1])
        return count, number, self._scores(number, address.index_select(1, cell))

    def _mean(self, address: Tensor, winner: Tensor) -> Tensor:
        """Return the mean score of W at each corner, or a little less, but never more."""
        top = self._scores(winner, address)
        # Shortfalls are never negative, so that their sum loses nothing to cancellation.
        shortfall = torch.zeros_like(top)
        count = torch.zeros_like(top[0])
        for corner, number in enumerate(winner):
            new = reduce(torch.bitwise_and, winner[:corner] != number, torch.ones_like(number, dtype=torch.bool))
            cell = new.nonzero()[:, 0]
            shortfall[:, cell] += top[:, cell] - self._scores(number[cell], address[:, cell])
            count += new
        return top - shortfall / count * (1 + ROUNDING)

    def _interpolated(self, corners: Tensor, fraction: Tensor) -> Tensor:
        for axis, wide in enumerate(self.wide):
            if wide:
                low, high = corners.chunk(2)
                corners = torch.lerp(low, high, fraction[axis])
        return corners[0]

    def _corners(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the corners (corners, n) of cells lie in the memory of a class, and the winners there."""
        strides = self.scores.stride()[1:]
        index = unraveled(cells, self.winner.shape)
        address = sum(i * stride for i, stride in zip(index, strides, strict=True)) + self._steps(strides)
        return address, self.winner.take(self._places(cells)).long()

    def _places(self, cells: Tensor) -> Tensor:
        return cells + self._steps(self.winner.stride())

    def _steps(self, strides: tuple[int, ...]) -> Tensor:
        steps = torch.zeros((1, 1), dtype=torch.int64, device=self.scores.device)
        for stride, wide in zip(reversed(strides), reversed(self.wide), strict=True):
            if wide:
                steps = torch.cat([steps, steps + stride])
        return steps

    def _scores(self, number: Tensor | int, address: Tensor) -> Tensor:
        """Return the scores of classes `number` where a class has them at `address`."""
        shape, strides = self.scores.shape, self.scores.stride()
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        return self.scores.as_strided((size,), (1,)).take(address + number * strides[0])


def ranked(scores: Tensor, *, regions: bool) -> tuple[Tensor, Tensor]:
    """Return for each voxel of (C, I, J, K) the winner, int16, and the second largest score.

    Of equal scores the lower class wins. With `regions` the winner is 1 + the last class above 0, or 0.
    """
    winners = torch.empty(scores.shape[1:], dtype=torch.int16, device=scores.device)
    seconds = torch.full(scores.shape[1:], -torch.inf, device=scores.device)
    rows = max(1, CACHED_SCORES // winners[0].numel())
    parts = (torch.split(scores, rows, dim=1), torch.split(winners, rows), torch.split(seconds, rows))
    for part, out, second in zip(*parts, strict=True):
        # In float32 throughout, where torch is quickest. Numbers ascend, so the last to win is the largest.
        best = torch.zeros_like(part[0]) if regions else part[0].clone()
        winner, new = torch.zeros_like(best), torch.empty_like(best)
        for number, score in enumerate(part if regions else part[1:], start=1):
            torch.gt(score, best, out=new)
            torch.maximum(winner, new.mul_(number), out=winner)
            if not regions:
                torch.maximum(second, torch.minimum(best, score, out=new), out=second)
                torch.maximum(best, score, out=best)
        out.copy_(winner)
    return winners, seconds


def unraveled(index: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return flat indices as indices of three axes. torch.unravel_index imports sympy, which takes a second."""
    plane = shape[1] * shape[2]
    within = index % plane
    return index // plane, within // shape[2], within % shape[2]


def numbered(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of whole numbers, ascending, and the number of each element among them.

    As torch.unique, but without sorting: quick where the values lie close together.
    """
    low, high = int(values.min()), int(values.max())
    seen = torch.zeros(high - low + 1, dtype=torch.bool, device=values.device)
    seen[values - low] = True
    distinct = seen.nonzero()[:, 0]
    number = torch.empty(len(seen), dtype=torch.int64, device=values.device)
    number[distinct] = torch.arange(len(distinct), device=values.device)
    return distinct + low, number[values - low]
