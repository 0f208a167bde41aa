"""Resampling as nnU-Net does it, so that its networks see what they were trained on.

It differs from `medseg.process.resample` in three ways. What shrinks is not smoothed first. A cubic spline goes on
with the edge value beyond the outer voxels, where it may swing, and what swings out of the range of the input is cut
back into it (the edge mode and `clip` of scikit-image's `resize`). And an axis with much longer voxels is resampled by
itself, to the nearest voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.process.resample import (
    AxisPositions,
    apply_matrices,
    axis_matrix,
    finite_float32,
    parallel_axes,
    resample,
    settle_constants,
    spline_matrix,
)
from medseg.volume import Grid, Volume

TIE_DIGITS = 9
"""Positions are rounded to so many digits before the nearest voxel is taken, so that noise decides no tie."""


def resize(volume: Volume, grid: Grid, *, order: int, separate: float | None) -> Volume:
    """Return `volume` sampled onto `grid`, which covers the same field of view with axes along those of the volume.

    `order` is 0, 1 or 3; `separate` as in `separate_axis`. Where the axes are turned against each other it is
    `resample`. Raises InputError for NaN or infinity.
    """
    axes = parallel_axes(volume.grid, grid)
    if axes is None or all(axis.on_voxels for axis in axes):
        return resample(volume, grid, order=order)
    spacing = [volume.grid.spacing_mm[axis.source_axis] for axis in axes]
    alone = separate_axis(spacing, grid.spacing_mm, separate)
    array = finite_float32(volume.array.transpose(0, *(axis.source_axis + 1 for axis in axes)))
    matrices = [_matrix(axis, size, order) for axis, size in zip(axes, array.shape[1:], strict=True)]
    if alone is None:
        result = apply_matrices(array, matrices)
        _limit(result, array, (1, 2, 3))
    else:
        picked = array.take(_nearest_voxels(axes[alone], array.shape[alone + 1]), alone + 1)
        matrices[alone] = np.eye(picked.shape[alone + 1], dtype=np.float32)
        result = apply_matrices(picked, matrices)
        _limit(result, picked, tuple(axis for axis in (1, 2, 3) if axis != alone + 1))
    settle_constants(array, result, axes)
    return Volume(result, grid)


def resize_labels(labels: Volume, grid: Grid, *, separate: float | None) -> Volume:
    """Return a label map (C = 1) sampled onto `grid` as in `resize`: the label with the largest linear share wins.

    Of equal shares the one of the nearest voxel wins, or else the lower label. They are common (an edge of the source
    in the middle of a voxel), and whether two are equal is a matter of rounding. So they are computed by the function
    that scikit-image's `resize` calls, in float64 and with axes in the order (z, y, x): as batchgenerators 0.25.5 does.
    """
    axes = parallel_axes(labels.grid, grid)
    if axes is None or all(axis.on_voxels for axis in axes):
        return resample(labels, grid, order=0)
    spacing = [labels.grid.spacing_mm[axis.source_axis] for axis in axes]
    alone = separate_axis(spacing, grid.spacing_mm, separate)
    array = labels.array[0].transpose([axis.source_axis for axis in axes])
    array = array[tuple(slice(None, None, -1 if axis.step < 0 else 1) for axis in axes)]
    if alone is not None:
        way = _nearest_voxels(axes[alone], array.shape[alone])
        array = array.take(way[::-1] if axes[alone].step < 0 else way, alone)
    result = _largest_share(array.T, np.divide(grid.shape, array.shape)[::-1].tolist())
    return Volume(result.T[None].astype(labels.array.dtype), grid)


def _largest_share(array: NDArray[np.integer], ratios: Sequence[float]) -> NDArray[np.integer]:
    closest = ndimage.zoom(array, ratios, order=0, mode="nearest", grid_mode=True)
    best, own = np.zeros(closest.shape), np.zeros(closest.shape)
    winner = closest.copy()
    for value in np.unique(array):
        share = ndimage.zoom((array == value).astype(np.float64), ratios, order=1, mode="nearest", grid_mode=True)
        share = np.clip(share, 0, 1)
        winner[share > best] = value
        best = np.maximum(best, share)
        own = np.where(closest == value, share, own)
    settled: NDArray[np.integer] = np.where(own == best, closest, winner)
    return settled


def separate_axis(before_mm: Sequence[float], after_mm: Sequence[float], above: float | None) -> int | None:
    """Return the axis that is resampled by itself: that of the longest voxels of the first anisotropic spacing.

    A spacing is anisotropic where its longest voxel edge is more than `above` times its shortest. Where two edges are
    equally long, and where `above` is None, no axis is resampled by itself.
    """
    if above is None:
        return None
    for spacing in (before_mm, after_mm):
        longest = max(spacing)
        if longest / min(spacing) > above:
            axes = [axis for axis, length in enumerate(spacing) if math.isclose(length, longest, rel_tol=1e-5)]
            return axes[0] if len(axes) == 1 else None
    return None


def nearest(axis: AxisPositions) -> AxisPositions:
    """Return positions moved to the nearest voxel; halfway between two voxels that is the upper one."""
    return replace(axis, positions=np.floor(np.round(axis.positions, TIE_DIGITS) + 0.5))


def _nearest_voxels(axis: AxisPositions, size: int) -> NDArray[np.intp]:
    return nearest(axis).positions.astype(np.intp).clip(0, size - 1)


def _matrix(axis: AxisPositions, size: int, order: int) -> NDArray[np.float32]:
    if order == 3:
        return spline_matrix(axis.positions, size)
    return axis_matrix(nearest(axis) if order == 0 else axis, size, order=order, smooth=False)


def _limit(result: NDArray[np.float32], source: NDArray[np.float32], axes: tuple[int, ...]) -> None:
    """Cut values back into the range that the source has over `axes`."""
    np.clip(result, source.min(axis=axes, keepdims=True), source.max(axis=axes, keepdims=True), out=result)
