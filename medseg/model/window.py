"""The sliding window: tiles run in order along one axis, and rows that no later tile touches leave at once.

Memory holds one patch length of logits along that axis, whatever the length of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from medseg.process.patches import Shape, normalized_weights, tile_starts

Predict = Callable[[Tensor], Tensor]
"""From a tile (C, I, J, K) to its logits (outputs, I, J, K)."""

Progress = Callable[[int, int], None]
"""Called with the number of tiles done and the number there are."""


@dataclass(frozen=True)
class Window:
    """Where the tiles of one image lie: starts along each axis, the patch, and the axis that is streamed along."""

    shape: Shape
    patch: Shape
    starts: tuple[list[int], list[int], list[int]]
    axis: int

    @classmethod
    def over(cls, shape: Shape, patch: Shape, step: float) -> Window:
        """Return the window over an image (I, J, K) of at least the patch, streamed so that its slab is smallest."""
        i, j, k = (tile_starts(size, edge, step) for size, edge in zip(shape, patch, strict=True))
        slab = [edge / size for size, edge in zip(shape, patch, strict=True)]
        return cls(shape, patch, (i, j, k), slab.index(min(slab)))

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        i, j, k = self.starts
        return len(i) * len(j) * len(k)


def finished_rows(
    image: Tensor, window: Window, predict: Predict, outputs: int, *, progress: Progress | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first, logits) in order: finished rows along the streamed axis, from row `first` on.

    Consecutive parts overlap by one row, so that every voxel between two rows lies within one part. A part is a view
    of a buffer: use it before asking for the next. The blend weights of all tiles at a voxel add up to one.
    """
    axis, patch = window.axis, window.patch
    weights = [
        [torch.from_numpy(w).to(image) for w in normalized_weights(size, edge, starts)]
        for size, edge, starts in zip(window.shape, patch, window.starts, strict=True)
    ]
    # One row more than the patch: the last finished row stays for interpolation with the next.
    size = [outputs, *window.shape]
    size[axis + 1] = patch[axis] + 1
    buffer = torch.zeros(size, device=image.device)
    others = [d for d in range(3) if d != axis]
    base, done = 0, 0
    for place, start in enumerate(window.starts[axis]):
        base = _advance(buffer, axis + 1, base, max(0, start - 1))
        for pair in product(*(range(len(window.starts[d])) for d in others)):
            index = [0, 0, 0]
            index[axis], index[others[0]], index[others[1]] = place, *pair
            corner = [window.starts[d][index[d]] for d in range(3)]
            tile = image[(slice(None), *(slice(c, c + edge) for c, edge in zip(corner, patch, strict=True)))]
            wi, wj, wk = (weights[d][index[d]] for d in range(3))
            corner[axis] -= base
            target = buffer[(slice(None), *(slice(c, c + edge) for c, edge in zip(corner, patch, strict=True)))]
            target.addcmul_(predict(tile), wi[:, None, None] * wj[:, None] * wk)
            done += 1
            if progress:
                progress(done, window.tiles)
        last = place + 1 == len(window.starts[axis])
        end = window.shape[axis] if last else window.starts[axis][place + 1]
        if end - base > 0:
            yield base, buffer.narrow(axis + 1, 0, end - base)


def _advance(buffer: Tensor, dim: int, base: int, new_base: int) -> int:
    """Move the rows of a buffer down so that it begins at `new_base`; what comes free is 0. Return `new_base`."""
    gone, size = new_base - base, buffer.shape[dim]
    if gone:
        # Row by row from the front: source and target never overlap, and no second buffer is needed.
        for row in range(size - gone):
            buffer.select(dim, row).copy_(buffer.select(dim, row + gone))
        buffer.narrow(dim, max(0, size - gone), min(gone, size)).zero_()
    return new_base
