"""Where patches lie: tile positions and blend weights of the sliding window, and padding to the patch. No networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.errors import UsageError

SIGMA_SHARE = 1 / 8
"""The blend weight's standard deviation as a share of the patch (nnU-Net's choice)."""

LEAST_WEIGHT = 1e-3
"""What a voxel of a tile counts at least in MONAI."""

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
    return [round(place * ((size - patch) / max(1, count - 1))) for place in range(count)]


def tile_starts_at(size: int, patch: int, overlap: float) -> list[int]:
    """Return the starts of tiles that lie int(patch * (1 - overlap)) voxels apart, the last one at the end.

    `size` must be at least `patch`. Source: MONAI's `dense_patch_slices`.
    """
    interval = max(1, int(patch * (1 - overlap)))
    return [*range(0, size - patch, interval), size - patch]


def blend_weights(patch: Sequence[int], *, gaussian: bool) -> NDArray[np.float32]:
    """Return by what each voxel (I, J, K) of a tile counts in MONAI: 1, or a Gaussian that is nowhere below 0.001.

    Source: MONAI's `compute_importance_map`.
    """
    weights = np.ones((1, 1, 1), np.float32)
    for axis, edge in enumerate(patch if gaussian else ()):
        along = np.arange(edge, dtype=np.float32) - np.float32((edge - 1) / 2)
        line = np.exp(-0.5 * (along / np.float32(edge * SIGMA_SHARE)) ** 2, dtype=np.float32)
        weights = weights * np.expand_dims(line, tuple({0, 1, 2} - {axis}))
    return np.array(np.broadcast_to(np.maximum(weights, np.float32(LEAST_WEIGHT)), tuple(patch)))


def normalized_weights(size: int, patch: int, starts: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return, for each tile along one axis, its shares (patch,) in its voxels: over all tiles they add up to 1.

    A tile counts by a Gaussian, most at voxel patch // 2 (as in nnU-Net), since a network sees most in its middle. The
    blend of a volume is the product of the shares along its three axes, so no sum of weights has to be kept or divided
    by.
    """
    gaussian = np.exp(-0.5 * ((np.arange(patch) - patch // 2) / (patch * SIGMA_SHARE)) ** 2)
    total = np.zeros(size)
    for start in starts:
        total[start : start + patch] += gaussian
    return [(gaussian / total[start : start + patch]).astype(np.float32) for start in starts]


def padding_to(shape: Sequence[int], patch: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the (before, after) voxels per axis that bring `shape` to at least `patch`, the image in the middle."""
    missing = [max(0, edge - size) for size, edge in zip(shape, patch, strict=True)]
    return tuple((gap // 2, gap - gap // 2) for gap in missing)
