"""The grid on which MONAI resamples, so that its networks see what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg.volume import Grid

SAME_SPACING_MM = 1e-3
"""Spacings that differ by no more are one."""

CORNER_TOLERANCE = 1e-8
"""A first corner that lies this close to the lowest indices of the new grid, in voxels, is where that begins."""


def corner_grid(grid: Grid, spacing_mm: Sequence[float]) -> Grid:
    """Return a grid with exactly this spacing along the axes of `grid`, from outer center to outer center.

    It has round((n - 1) * own / spacing) + 1 voxels along an axis, and begins at the center of the first voxel. Where
    the axes are turned, and rounded to float32, so that none is the lowest corner to 8 digits, the middles of both
    grids (index n / 2) are laid on each other instead: up to half a voxel elsewhere.
    Source: MONAI 1.6, `Spacing` and `compute_shape_offset`.
    """
    own, wanted = np.asarray(grid.spacing_mm), np.asarray(spacing_mm, dtype=np.float64)
    wanted = np.where(np.abs(own - wanted) <= SAME_SPACING_MM, own, wanted)
    shape = np.round((np.asarray(grid.shape) - 1) * own / wanted + 1)
    axes = grid.affine[:3, :3]
    # As in the source, by Cholesky: what decides is the noise of exactly this arithmetic.
    straight = axes @ np.linalg.inv(np.linalg.cholesky(axes.T @ axes).T) * wanted
    ends = np.stack(np.meshgrid(*((0.0, size - 1.0) for size in grid.shape), indexing="ij")).reshape(3, -1)
    affine = grid.affine.copy()
    affine[:3, :3] = axes * (wanted / own)
    if np.linalg.solve(straight, axes @ ends).min() < -CORNER_TOLERANCE:
        affine[:3, 3] = grid.to_world(np.asarray(grid.shape) / 2) - straight @ (shape / 2)
    i, j, k = shape.astype(int).tolist()
    return Grid((i, j, k), affine)
