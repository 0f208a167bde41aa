"""How far apart the surfaces of two masks lie, in mm, on any grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

from medseg.volume import Grid, box_of

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SurfaceScore:
    """Distances between two surfaces, where a surface is the voxels of a mask with a face towards the outside.

    `hd95_mm` is the larger of both 95th percentiles, `mean_mm` the mean over both surfaces, `dice` the share of both
    that lies within the tolerance of the other (Nikolov et al., "Clinically applicable segmentation of head and neck
    anatomy for radiotherapy", JMIR 2021). Between a surface and nothing `dice` is 0, and the distances are the diagonal
    of the image, the worst that there can be: who misses more must not look better.
    """

    dice: float
    hd95_mm: float
    mean_mm: float


def compare_surfaces(predicted: Mask, reference: Mask, grid: Grid, tolerance_mm: float) -> SurfaceScore:
    """Return the distances between two masks (I, J, K) on one grid, which may be oblique or sheared; NaN for none."""
    points = [_border(mask) @ grid.affine[:3, :3].T for mask in (predicted, reference)]
    if not all(map(len, points)):
        worst = _diagonal_mm(grid) if any(map(len, points)) else math.nan
        return SurfaceScore(worst * 0, worst, worst)
    there, back = (_distances(*pair) for pair in (points, points[::-1]))
    both = np.concatenate([there, back])
    hd95 = max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))
    return SurfaceScore(float((both <= tolerance_mm).mean()), hd95, float(both.mean()))


def _diagonal_mm(grid: Grid) -> float:
    """Return the longest distance between the centers of two voxels."""
    last = np.asarray(grid.shape) - 1
    signs = np.array([(1, a, b) for a in (-1, 1) for b in (-1, 1)])
    return float(np.linalg.norm((signs * last) @ grid.affine[:3, :3].T, axis=1).max())


def _border(mask: Mask) -> NDArray[np.float64]:
    """Return the indices (N, 3) of the voxels of a mask that have a face towards the outside."""
    box = box_of(mask)
    if box is None:
        return np.empty((0, 3))
    inner, first = mask[box], np.array([float(part.start) for part in box])
    return np.asarray(np.argwhere(inner & ~binary_erosion(inner)) + first)


def _distances(points: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    distances, _ = KDTree(others).query(points)
    return np.asarray(distances)
