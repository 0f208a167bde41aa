"""Where patches lie: tile positions and blend weights of the sliding window, and padding to the patch. No networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from medseg.errors import UsageError

SIGMA_SHARE = 1 / 8
"""The blend weight's standard deviation as a share of the patch (nnU-Net's choice)."""

SMALLEST_WEIGHT = 1e-4
"""Floor of the blend weights, so that a voxel seen by the corner of one tile alone keeps its logits in float32."""

Shape = tuple[int, int, int]


def tile_starts(size: int, patch: int, step: float) -> list[int]:
    """Return the starts of the fewest equally spaced tiles of `patch` voxels that cover `size`.

    Neighbors lie at most `step` patches apart, 0 < step <= 1. `size` must be at least `patch`.
    Raises UsageError for another step or a smaller size.
    """
    if not 0 < step <= 1:
        raise UsageError(f"The step between tiles is a share of the patch, above 0 and at most 1; here it is {step}.")
    if size < patch:
        raise UsageError(f"Tiles of {patch} voxels do not fit into {size}; pad the image first.")
    count = int(np.ceil((size - patch) / max(1.0, patch * step))) + 1
    return [round(place * (size - patch) / max(1, count - 1)) for place in range(count)]


def tiles(shape: Sequence[int], patch: Sequence[int], step: float) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the slices of every tile over `shape`, in order along the first axis."""
    starts = [tile_starts(size, edge, step) for size, edge in zip(shape, patch, strict=True)]
    for i, j, k in product(*starts):
        yield slice(i, i + patch[0]), slice(j, j + patch[1]), slice(k, k + patch[2])


def blend_weights(patch: Sequence[int]) -> NDArray[np.float32]:
    """Return a tile's Gaussian weights (I, J, K) float32, 1 at the center: where a tile sees most, it counts most."""
    i, j, k = (np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n * SIGMA_SHARE)) ** 2) for n in patch)
    weights = i[:, None, None] * j[:, None] * k
    return np.asarray(np.maximum(weights / weights.max(), SMALLEST_WEIGHT), dtype=np.float32)


def padding_to(shape: Sequence[int], patch: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the (before, after) voxels per axis that bring `shape` to at least `patch`, the image in the middle."""
    missing = [max(0, edge - size) for size, edge in zip(shape, patch, strict=True)]
    return tuple((gap // 2, gap - gap // 2) for gap in missing)
