"""Voxels of one grid sampled onto another.

Between grids whose axes are parallel, every resampling here is linear and separable: one matrix per axis holds
interpolation, spline prefilter and smoothing at once, and a volume is resampled by three matrix products. Grids that
are turned or sheared against each other go through scipy, a block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import GeometryError, InputError
from medseg.volume import Grid, Volume

SHRINK_LIMIT = 1.5
"""Beyond this ratio of spacings an image is smoothed first: sampling alone would skip voxels and alias."""

PARALLEL_TOLERANCE = 1e-3
"""Axes count as parallel when following one over the whole grid strays by less than this many source voxels."""

ON_VOXEL_TOLERANCE = 1e-4
"""A position this close to a voxel center, in voxels, is that voxel: no interpolation, exact values."""

BLOCK_VOXELS = 2**22
"""Voxels of the result that the general path computes at once."""

SPLINE_REACH = 12
"""Voxels around a block that its cubic spline needs: a neighbor's weight falls by 0.27 a voxel, to 1e-7 here."""

POOLED_EDGE, SETTLED_EDGE = 4, 8
"""Edges of the blocks of source and result in which constant regions are looked for."""

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class AxisPositions:
    """Where the voxels along one axis of the target lie on one axis of the source, in source indices."""

    source_axis: int
    positions: NDArray[np.float64]
    step: float

    @property
    def on_voxels(self) -> bool:
        """Whether every position is a voxel center."""
        return bool(np.abs(self.positions - np.round(self.positions)).max() < ON_VOXEL_TOLERANCE)

    def inside(self, size: int) -> NDArray[np.bool_]:
        """Return which positions lie in the field of view, which reaches half a voxel beyond the outer centers."""
        reach = 0.5 + PARALLEL_TOLERANCE
        return np.asarray((self.positions >= -reach) & (self.positions <= size - 1 + reach))


def resample(volume: Volume, grid: Grid, *, order: int = 1, fill: float | NDArray[np.generic] | None = None) -> Volume:
    """Return `volume` sampled onto `grid`; exact, in its own type, where the voxels of both coincide, else float32.

    `order` is 0 (nearest), 1 (linear) or 3 (cubic B-spline). Along an axis that shrinks by more than SHRINK_LIMIT the
    image is smoothed by a Gaussian first. Where all that a voxel draws on is one value, that is its value, without the
    rounding of the sum. Outside its field of view the volume goes on with its edge value, or is `fill` where that is
    given: one number, or one for each channel (C,). Raises GeometryError where the two do not overlap and InputError
    for NaN or infinity.
    """
    if order not in (0, 1, 3):
        raise GeometryError(f"Interpolation is of order 0, 1 or 3; here it is {order}.")
    axes = parallel_axes(volume.grid, grid)
    fills = None if fill is None else np.broadcast_to(fill, len(volume.array))
    if axes is None:
        return _resample_blocks(volume, grid, order, fills)
    sizes = [volume.grid.shape[axis.source_axis] for axis in axes]
    inside = [axis.inside(size) for axis, size in zip(axes, sizes, strict=True)]
    if not all(part.any() for part in inside):
        raise GeometryError("The image and the grid it is resampled onto do not overlap.")
    array = volume.array.transpose(0, *(axis.source_axis + 1 for axis in axes))
    if all(axis.on_voxels for axis in axes):
        picks = [_nearest(axis, size) for axis, size in zip(axes, sizes, strict=True)]
        result = array[:, picks[0][:, None, None], picks[1][:, None], picks[2]]
    else:
        matrices = [axis_matrix(axis, size, order=order) for axis, size in zip(axes, sizes, strict=True)]
        result = apply_matrices(finite_float32(array), matrices)
        settle_constants(array, result, axes)
    if fills is not None:
        _fill_outside(result, inside, fills)
    return Volume(result, grid)


def resample_labels(labels: Volume, grid: Grid) -> Volume:
    """Return a label map (C = 1) sampled onto `grid`: the label with the largest linearly interpolated share wins.

    Ties go to the lower value; outside the field of view the label is 0. The type is kept.
    Raises GeometryError where the two do not overlap.
    """
    values = np.unique(labels.array)
    axes = parallel_axes(labels.grid, grid)
    if len(values) == 1 or (axes is not None and all(axis.on_voxels for axis in axes)):
        return resample(labels, grid, order=0, fill=0)
    best = np.zeros((1, *grid.shape), np.float32)
    result = np.zeros((1, *grid.shape), labels.array.dtype)
    for value in values:
        # Values ascend and only a larger share replaces the winner so far, so ties go to the lower value.
        share = resample(labels.with_array((labels.array == value).astype(np.float32)), grid, order=1, fill=0).array
        wins = share > best + 1e-6
        result[wins] = value
        best[wins] = share[wins]
    return Volume(result, grid)


def parallel_axes(source: Grid, target: Grid) -> list[AxisPositions] | None:
    """Return, for each axis of `target`, the source axis it runs along and where; None where grids are not parallel."""
    step = np.linalg.solve(source.affine, target.affine)
    origin, step = step[:3, 3], step[:3, :3]
    owners = np.abs(step).argmax(axis=0)
    stray = np.abs(step).copy()
    stray[owners, range(3)] = 0
    if len(set(owners.tolist())) < 3 or (stray @ np.asarray(target.shape)).max() > PARALLEL_TOLERANCE:
        return None
    return [
        AxisPositions(int(owner), origin[owner] + step[owner, axis] * np.arange(size), float(step[owner, axis]))
        for axis, (owner, size) in enumerate(zip(owners, target.shape, strict=True))
    ]


def axis_matrix(axis: AxisPositions, size: int, *, order: int, smooth: bool = True) -> Matrix:
    """Return the (positions, size) matrix that interpolates along one axis of `size` voxels; edges are repeated."""
    positions = np.clip(axis.positions, 0, size - 1)
    if order == 0:
        return np.eye(size, dtype=np.float32)[_nearest(axis, size)]
    matrix = _linear(positions, size) if order == 1 else _cubic(positions, size)
    if smooth and abs(axis.step) > SHRINK_LIMIT:
        matrix = matrix @ ndimage.gaussian_filter1d(np.eye(size), _blur(abs(axis.step)), axis=0, mode="nearest")
    return matrix.astype(np.float32)


def spline_matrix(positions: NDArray[np.float64], size: int) -> Matrix:
    """Return the (positions, size) matrix of a cubic spline through voxels that go on with the edge value."""
    edges = np.pad(np.eye(size), ((SPLINE_REACH, SPLINE_REACH), (0, 0)), mode="edge")
    return np.asarray(_cubic(positions + SPLINE_REACH, len(edges)) @ edges, dtype=np.float32)


def apply_matrices(array: NDArray[np.float32], matrices: Sequence[Matrix]) -> NDArray[np.float32]:
    """Return (C, I, J, K) times one matrix per spatial axis, the axis that shrinks most first."""
    for axis in sorted(range(3), key=lambda axis: matrices[axis].shape[0] / matrices[axis].shape[1]):
        matrix = matrices[axis]
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
            continue
        if axis == 2:
            array = (array.reshape(-1, array.shape[3]) @ matrix.T).reshape(*array.shape[:3], -1)
        elif axis == 1:
            array = matrix @ array
        else:
            flat = matrix @ array.reshape(*array.shape[:2], -1)
            array = flat.reshape(array.shape[0], len(matrix), *array.shape[2:])
    return array


def settle_constants(source: NDArray[np.generic], result: NDArray[np.float32], axes: Sequence[AxisPositions]) -> None:
    """Set blocks of the result to a value that holds throughout what they draw on of the source: air becomes constant.

    Beyond SPLINE_REACH a spline's weights sum to less than float32 can tell.
    """
    low, high = _pooled(source, np.minimum), _pooled(source, np.maximum)
    for place, axis in enumerate(axes):
        reach = SPLINE_REACH + (int(4 * _blur(abs(axis.step))) + 1 if abs(axis.step) > SHRINK_LIMIT else 0)
        spans = _spans(axis, source.shape[place + 1], reach)
        low = np.stack([low.take(range(*span), place + 1).min(place + 1) for span in spans], place + 1)
        high = np.stack([high.take(range(*span), place + 1).max(place + 1) for span in spans], place + 1)
    constant = low == high
    for channel, row in np.argwhere(constant.any(axis=(2, 3))):
        rows = result[channel, row * SETTLED_EDGE : (row + 1) * SETTLED_EDGE]
        where, values = (_spread(blocks[channel, row], rows.shape[1:]) for blocks in (constant, low))
        np.copyto(rows, values, where=where, casting="unsafe")


def _spread(blocks: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    return blocks.repeat(SETTLED_EDGE, axis=0).repeat(SETTLED_EDGE, axis=1)[: shape[0], : shape[1]]


def _pooled(array: NDArray[np.generic], extreme: np.ufunc) -> NDArray[np.generic]:
    """Return the extreme of each block of POOLED_EDGE voxels; the last ones may be smaller."""
    # The axis with the largest steps in memory first: whole lines are compared at once.
    for axis in sorted((1, 2, 3), key=lambda axis: -array.strides[axis]):
        lines = np.moveaxis(array, axis, 0)
        pooled = lines[::POOLED_EDGE].copy(order="K")
        for offset in range(1, POOLED_EDGE):
            others = lines[offset::POOLED_EDGE]
            extreme(pooled[: len(others)], others, out=pooled[: len(others)])
        array = np.moveaxis(pooled, 0, axis)
    return array


def _spans(axis: AxisPositions, size: int, reach: int) -> list[tuple[int, int]]:
    """Return for each block along an axis of the result which blocks of the source, from up to, it draws on."""
    positions = np.clip(axis.positions, 0, size - 1)
    starts = range(0, len(positions), SETTLED_EDGE)
    blocks = [positions[start : start + SETTLED_EDGE] for start in starts]
    last = (size - 1) // POOLED_EDGE
    low = [max(0, int(block.min() - reach) // POOLED_EDGE) for block in blocks]
    high = [min(last, int(block.max() + reach + 1) // POOLED_EDGE) for block in blocks]
    return [(a, b + 1) for a, b in zip(low, high, strict=True)]


def _linear(positions: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    return np.asarray(np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(size))))


def _cubic(positions: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    # Nodes beyond the ends are mirrored, as the prefilter takes them (Unser, "Splines", IEEE Signal Processing 1999).
    weights = np.zeros((len(positions), size))
    for node in range(-2, size + 2):
        distance = np.abs(positions - node)
        near = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.maximum(0, 2 - distance) ** 3 / 6)
        weights[:, _mirrored(node, size)] += near
    return np.asarray(weights @ ndimage.spline_filter1d(np.eye(size), order=3, axis=0, mode="mirror"))


def _mirrored(node: int, size: int) -> int:
    if size == 1:
        return 0
    node = abs(node) % (2 * size - 2)
    return min(node, 2 * size - 2 - node)


def _blur(shrink: float) -> float:
    """Return the Gaussian's sigma in source voxels: half of what the coarser voxel is larger by."""
    return (shrink - 1) / 2


def _nearest(axis: AxisPositions, size: int) -> NDArray[np.intp]:
    return np.clip(np.round(axis.positions), 0, size - 1).astype(np.intp)


def _fill_outside(array: NDArray[np.generic], inside: Sequence[NDArray[np.bool_]], fills: NDArray[np.generic]) -> None:
    i, j, k = inside
    for channel, fill in zip(array, fills, strict=True):
        channel[~i] = fill
        channel[:, ~j] = fill
        channel[:, :, ~k] = fill


def finite_float32(array: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the array as contiguous float32. Raises InputError where a voxel is NaN or infinite."""
    result = np.ascontiguousarray(array, dtype=np.float32)
    # One infinite or undefined voxel makes the sum so; summing is far cheaper than testing each voxel.
    if not np.isfinite(result.sum(dtype=np.float64)):
        raise InputError(
            "The image has voxels that are NaN or infinite, which would spread when it is resampled; "
            "replace them by a number first.",
            reason="not_finite",
        )
    return result


def _resample_blocks(volume: Volume, grid: Grid, order: int, fills: NDArray[np.generic] | None) -> Volume:
    matrix = np.asarray(np.linalg.solve(volume.grid.affine, grid.affine), dtype=np.float64)
    sigma = [_blur(step) if order and step > SHRINK_LIMIT else 0.0 for step in np.abs(matrix[:3, :3]).max(axis=1)]
    margin = SPLINE_REACH + int(4 * max(sigma))
    size = np.asarray(volume.grid.shape)
    result = np.empty((len(volume.array), *grid.shape), np.float32)
    rows = max(1, BLOCK_VOXELS // (grid.shape[1] * grid.shape[2]))
    overlap = False
    for first in range(0, grid.shape[0], rows):
        block = result[:, first : first + rows]
        positions = _positions(matrix, first, block.shape[1:])
        inside = np.ones(block.shape[1:], bool)
        for axis, voxels in enumerate(size):
            reach = 0.5 + PARALLEL_TOLERANCE
            inside &= (positions[axis] >= -reach) & (positions[axis] <= voxels - 1 + reach)
            np.clip(positions[axis], 0, voxels - 1, out=positions[axis])
        start = np.maximum(0, [int(part.min()) - margin for part in positions])
        stop = np.minimum(size, [int(part.max()) + margin + 2 for part in positions])
        positions -= start[:, None, None, None]
        source = finite_float32(volume.cropped(start.tolist(), stop.tolist()).array)
        for channel, out in zip(source, block, strict=True):
            smooth = ndimage.gaussian_filter(channel, sigma, mode="nearest") if any(sigma) else channel
            ndimage.map_coordinates(smooth, positions, out, order=order, mode="mirror")
        overlap |= bool(inside.any())
        if fills is not None:
            block[:, ~inside] = fills[:, None]
    if not overlap:
        raise GeometryError("The image and the grid it is resampled onto do not overlap.")
    return Volume(result, grid)


def _positions(matrix: NDArray[np.float64], first: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the source indices (3, I, J, K) of the voxels of a block that begins at row `first` of the target."""
    i, j, k = (np.arange(n, dtype=np.float64) for n in shape)
    positions = np.empty((3, *shape))
    for axis in range(3):
        a, b, c, origin = matrix[axis]
        positions[axis] = (a * (i + first) + origin)[:, None, None] + (b * j)[:, None] + c * k
    return positions
