"""The sliding window: tiles run in order along one axis, and rows that no later tile touches leave at once.

Memory holds one patch length of logits along that axis, whatever the length of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.model.plan import Tiling
from medseg.process.patches import Shape, blend_weights, normalized_weights, tile_starts, tile_starts_at

Predict = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From tiles (C, I, J, K) to the logits (outputs, I, J, K) of each."""

Progress = Callable[[int, int], None]
"""Called with the number of tiles done and the number there are."""


@dataclass(frozen=True)
class Window:
    """Where the tiles of one image lie: starts along each axis, the patch, and the axis that is streamed along.

    `weights` (I, J, K) is by what each voxel of a tile counts; by default medseg's own Gaussian.
    """

    shape: Shape
    patch: Shape
    starts: tuple[list[int], list[int], list[int]]
    axis: int
    weights: NDArray[np.float32] | None = None

    @classmethod
    def over(cls, shape: Shape, patch: Shape, step: float) -> Window:
        """Return the window over an image (I, J, K) of at least the patch, streamed so that its slab is smallest."""
        i, j, k = (tile_starts(size, edge, step) for size, edge in zip(shape, patch, strict=True))
        return cls._through(shape, patch, (i, j, k))

    @classmethod
    def tiled(cls, shape: Shape, patch: Shape, tiling: Tiling) -> Window:
        """Return the window that a plan asks for over an image (I, J, K) of at least the patch."""
        i, j, k = (tile_starts_at(*axis) for axis in zip(shape, patch, tiling.overlap, strict=True))
        window = cls._through(shape, patch, (i, j, k))
        return replace(window, weights=blend_weights(patch, gaussian=tiling.blend == "gaussian"))

    @classmethod
    def _through(cls, shape: Shape, patch: Shape, starts: tuple[list[int], list[int], list[int]]) -> Window:
        slab = [edge / size for size, edge in zip(shape, patch, strict=True)]
        return cls(shape, patch, starts, slab.index(min(slab)))

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        i, j, k = self.starts
        return len(i) * len(j) * len(k)

    def row(self, place: int) -> list[tuple[int, int, int]]:
        """Return the tiles, as places in `starts`, that begin at one start along the streamed axis."""
        counts = [range(len(starts)) for starts in self.starts]
        counts[self.axis] = range(place, place + 1)
        return list(product(counts[0], counts[1], counts[2]))

    def buffer_shape(self, outputs: int) -> tuple[int, ...]:
        """Return the shape of what must be held: one patch along the streamed axis, and the row before it."""
        shape = [outputs, *self.shape]
        shape[self.axis + 1] = self.patch[self.axis] + 1
        return tuple(shape)

    def shares(self, like: Tensor) -> Callable[[Sequence[int]], Tensor]:
        """Return what gives the shares (I, J, K) of a tile, by its places in `starts`, on the device of `like`."""
        if self.weights is not None:
            return self._weighed(torch.from_numpy(self.weights).to(like))
        lines = [
            [torch.from_numpy(share).to(like) for share in normalized_weights(size, edge, starts)]
            for size, edge, starts in zip(self.shape, self.patch, self.starts, strict=True)
        ]

        def share(tile: Sequence[int]) -> Tensor:
            i, j, k = (lines[d][tile[d]] for d in range(3))
            return i[:, None, None] * j[:, None] * k

        return share

    def _weighed(self, weights: Tensor) -> Callable[[Sequence[int]], Tensor]:
        """Return what gives the shares of a tile by weights that are no product of lines: their sum has to be kept."""
        total = weights.new_zeros(self.shape)
        for place in range(len(self.starts[self.axis])):
            for tile in self.row(place):
                total[self._part(tile)] += weights
        return lambda tile: weights / total[self._part(tile)]

    def _part(self, tile: Sequence[int]) -> tuple[slice, ...]:
        return _box([self.starts[d][tile[d]] for d in range(3)], self.patch)[1:]


def finished_rows(
    image: Tensor, window: Window, predict: Predict, buffer: Tensor, *, batch: int = 1, progress: Progress | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first, logits) in order: finished rows along the streamed axis, from row `first` on.

    `buffer` is what `window.buffer_shape` says, full of zeros, on any device. Consecutive parts overlap by one row, so
    that every voxel between two rows lies within one part. A part is a view of the buffer: use it before asking for
    the next.
    """
    axis, base, done = window.axis, 0, 0
    share = window.shares(buffer)
    for place, start in enumerate(window.starts[axis]):
        base = _advance(buffer, axis + 1, base, max(0, start - 1))
        row = window.row(place)
        for first in range(0, len(row), batch):
            some = row[first : first + batch]
            corners = [[window.starts[d][tile[d]] for d in range(3)] for tile in some]
            logits = predict([image[_box(corner, window.patch)] for corner in corners])
            for tile, corner, scores in zip(some, corners, logits, strict=True):
                corner[axis] -= base
                target = buffer[_box(corner, window.patch)]
                target.addcmul_(scores.to(buffer.device), share(tile))
            done += len(some)
            if progress:
                progress(done, window.tiles)
        last = place + 1 == len(window.starts[axis])
        end = window.shape[axis] if last else window.starts[axis][place + 1]
        yield base, buffer.narrow(axis + 1, 0, end - base)


def _box(corner: Sequence[int], patch: Sequence[int]) -> tuple[slice, ...]:
    return (slice(None), *(slice(start, start + edge) for start, edge in zip(corner, patch, strict=True)))


def _advance(buffer: Tensor, dim: int, base: int, new_base: int) -> int:
    """Move the rows of a buffer down so that it begins at `new_base`; what comes free is 0. Return `new_base`."""
    gone, size = new_base - base, buffer.shape[dim]
    if gone:
        # Row by row from the front: source and target never overlap, and no second buffer is needed.
        for row in range(size - gone):
            buffer.select(dim, row).copy_(buffer.select(dim, row + gone))
        buffer.narrow(dim, max(0, size - gone), min(gone, size)).zero_()
    return new_base
