"""Where voxels lie, and the one type that flows through medseg.

Three words carry everything else:

- *index*: (i, j, k), the position of a voxel in its array, in array order; whole numbers are voxel centers.
- *world*: (x, y, z) in millimeters, RAS+: x grows to the patient's right, y to the front, z to the head.
- *affine*: the 4 x 4 matrix that takes an index to its world position.

A `Grid` is a shape and an affine: a place in the patient without voxels. A `Volume` is an array (C, I, J, K) on a Grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import ArrayLike, DTypeLike, NDArray

from medseg.errors import GeometryError

GRID_TOLERANCE_MM = 1e-3
"""Two grids match when no voxel center differs by more than this; scanners and float32 headers round to about 1e-4."""

ORTHOGONAL_TOLERANCE = 1e-4
"""Axes count as perpendicular when the cosine between them is below this: what ITK accepts in a NIfTI header."""

Affine = NDArray[np.float64]
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Grid:
    """A shape (I, J, K) and an affine from voxel-center index to RAS+ mm. Frozen, and valid once made.

    Raises GeometryError for a shape that is not three positive numbers, or an affine that is not finite and invertible.
    """

    shape: tuple[int, int, int]
    affine: Affine

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"A grid needs three axes of at least one voxel each; the shape here is {shape}.")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.array_equal(affine[3], (0, 0, 0, 1)):
            raise GeometryError("An affine is a 4 x 4 matrix whose last row is 0 0 0 1; here it is not.")
        if not np.isfinite(affine).all() or not _invertible(affine[:3, :3]):
            raise GeometryError("The affine is not finite and invertible: it places several voxels on one spot.")
        affine.flags.writeable = False
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance in mm between neighboring voxel centers along each array axis."""
        a, b, c = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(a), float(b), float(c)

    @cached_property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm³, right for sheared grids too."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @cached_property
    def orientation(self) -> str:
        """Where each array axis points, roughly: "RAS" when i grows to the right, j to the front, k to the head."""
        return "".join(orientations.aff2axcodes(self.affine))

    @cached_property
    def is_orthogonal(self) -> bool:
        """Whether the three axes are perpendicular; a tilted stack is not."""
        axes = self.affine[:3, :3] / np.asarray(self.spacing_mm)
        return bool(np.abs(axes.T @ axes - np.eye(3)).max() < ORTHOGONAL_TOLERANCE)

    def to_world(self, index: ArrayLike) -> NDArray[np.float64]:
        """Return the world positions (..., 3) in mm of indices (..., 3); fractions lie between voxel centers."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, world_mm: ArrayLike) -> NDArray[np.float64]:
        """Return the fractional indices (..., 3) of world positions (..., 3) in mm."""
        offset = np.asarray(world_mm, dtype=np.float64) - self.affine[:3, 3]
        index = np.linalg.solve(self.affine[:3, :3], offset.reshape(-1, 3).T).T
        return np.asarray(index.reshape(offset.shape), dtype=np.float64)

    def reoriented(self, orientation: str) -> Grid:
        """Return the same voxels with the array axes permuted and flipped to point as `orientation` ("RAS", "LPS" ...).

        Raises GeometryError for a word that does not name three different axes.
        """
        step = self._steps_to(orientation)
        shape = tuple(self.shape[axis] for axis in orientations_to_axes(step))
        return Grid(shape, self.affine @ orientations.inv_ornt_aff(step, self.shape))  # type: ignore[arg-type]

    def with_spacing(self, spacing_mm: Sequence[float]) -> Grid:
        """Return a grid over the same field of view with about this spacing.

        The field of view reaches half a voxel beyond the outer centers and is kept exactly, so each axis gets
        round(extent / spacing) voxels, at least one, and a spacing that may differ a little from the one asked for.
        """
        wanted = np.asarray(spacing_mm, dtype=np.float64)
        if wanted.shape != (3,) or not np.isfinite(wanted).all() or wanted.min() <= 0:
            raise GeometryError(f"A spacing is three positive lengths in mm; here it is {wanted.tolist()}.")
        # In this order nnU-Net rounds alike where an extent lies halfway.
        shape = np.maximum(1, np.round(np.asarray(self.spacing_mm) / wanted * np.asarray(self.shape))).astype(int)
        scale = np.asarray(self.shape) / shape
        affine = self.affine.copy()
        affine[:3, :3] *= scale
        affine[:3, 3] = self.to_world((scale - 1) / 2)
        return Grid(tuple(shape.tolist()), affine)

    def orthogonalized(self) -> Grid:
        """Return a grid with perpendicular axes that covers this one; itself where its axes are perpendicular already.

        The first axis and the plane of the first two are kept: of a tilted CT the slices stay slices, and only the
        direction of stacking is straightened.
        """
        if self.is_orthogonal:
            return self
        axes, lengths = np.linalg.qr(self.affine[:3, :3])
        axes = axes * np.sign(np.diag(lengths))
        spacing = np.abs(np.diag(lengths))
        corners = _corners(np.full(3, -0.5), np.asarray(self.shape) - 0.5) @ self.affine[:3, :3].T @ axes / spacing
        low = corners.min(axis=0)
        shape = np.ceil(corners.max(axis=0) - low - ORTHOGONAL_TOLERANCE).astype(int)
        affine = np.eye(4)
        affine[:3, :3] = axes * spacing
        affine[:3, 3] = self.affine[:3, 3] + affine[:3, :3] @ (low + 0.5)
        return Grid(tuple(shape.tolist()), affine)

    def cropped(self, start: Sequence[int], stop: Sequence[int]) -> Grid:
        """Return the part from index `start` up to, not including, `stop`.

        Raises GeometryError where that is empty or reaches beyond the grid.
        """
        begin, end = np.asarray(start, dtype=int), np.asarray(stop, dtype=int)
        if (begin < 0).any() or (end > self.shape).any() or (begin >= end).any():
            raise GeometryError(
                f"The crop from {tuple(begin.tolist())} to {tuple(end.tolist())} "
                f"is empty or leaves the grid {self.shape}."
            )
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(begin)
        return Grid(tuple((end - begin).tolist()), affine)

    def covering(self, box_mm: Sequence[Sequence[float]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the (start, stop) indices of the smallest part whose voxels cover a world box.

        `box_mm` is two opposite corners, ((x, y, z), (x, y, z)) in mm. Parts of the box beyond the grid are left out.
        Raises GeometryError for a box that is no box or misses the grid.
        """
        ends = np.asarray(box_mm, dtype=np.float64)
        if ends.shape != (2, 3) or not np.isfinite(ends).all():
            raise GeometryError("A box is two corners of three coordinates each, in mm of RAS+ world space.")
        # Rounded, so that a box that ends on the border of two voxels does not reach into the second by 1e-15.
        index = np.round(self.to_index(_corners(ends[0], ends[1])), 6)
        first = np.floor(index.min(axis=0) + 0.5)
        behind = np.maximum(first + 1, np.ceil(index.max(axis=0) + 0.5))
        start, stop = (np.clip(edge, 0, self.shape).astype(int) for edge in (first, behind))
        if (start >= stop).any():
            raise GeometryError(
                f"The box from {tuple(ends[0].tolist())} to {tuple(ends[1].tolist())} mm lies outside the image."
            )
        return tuple(start.tolist()), tuple(stop.tolist())

    def matches(self, other: Grid, tolerance_mm: float = GRID_TOLERANCE_MM) -> bool:
        """Return whether both grids have one shape and no voxel center differs by more than `tolerance_mm`."""
        if self.shape != other.shape:
            return False
        corners = _corners(np.zeros(3), np.asarray(self.shape) - 1.0)
        return bool(np.linalg.norm(self.to_world(corners) - other.to_world(corners), axis=1).max() <= tolerance_mm)

    def _steps_to(self, orientation: str) -> NDArray[np.float64]:
        pairs = ["LRPAIS".find(letter) // 2 for letter in orientation.upper()]
        if sorted(pairs) != [0, 1, 2]:
            raise GeometryError(
                f"An orientation is one letter of each pair L/R, P/A, I/S, such as RAS; here it is {orientation!r}."
            )
        target = orientations.axcodes2ornt(tuple(orientation.upper()))
        return np.asarray(orientations.ornt_transform(orientations.io_orientation(self.affine), target))


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels (C, I, J, K) on a Grid: an image, labels (C = 1, whole numbers) or class scores. Frozen.

    The voxels may be a memory map and are never walked through to check them.
    Raises GeometryError where array and grid disagree or the array holds no real numbers.
    """

    array: Array
    grid: Grid

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[0] < 1 or self.array.shape[1:] != self.grid.shape:
            raise GeometryError(
                f"A volume on a grid {self.grid.shape} needs an array (channels, {self.grid.shape[0]}, "
                f"{self.grid.shape[1]}, {self.grid.shape[2]}); the one here is {self.array.shape}."
            )
        if self.array.dtype.kind not in "buif":
            raise GeometryError(f"Voxels are real numbers; these are of type {self.array.dtype}.")

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Return the voxels (C, I, J, K), as `np.asarray(volume)` asks for them; a copy only where it must be one.

        Raises ValueError where `copy` is False and another type needs one.
        """
        if dtype is not None and np.dtype(dtype) != self.array.dtype:
            if copy is False:
                raise ValueError("Voxels of another type are a copy, and none is allowed (copy=False).")
            return self.array.astype(dtype)
        return self.array.copy() if copy else np.asarray(self.array)

    def with_array(self, array: Array) -> Volume:
        """Return other voxels in the same place."""
        return Volume(array, self.grid)

    def reoriented(self, orientation: str) -> Volume:
        """Return the same voxels in the same place with the array axes pointing as `orientation`. Lossless; a view."""
        step = self.grid._steps_to(orientation)
        axes = orientations_to_axes(step)
        flips = tuple(slice(None, None, int(step[axis, 1])) for axis in axes)
        array = self.array.transpose(0, *(axis + 1 for axis in axes))[(slice(None), *flips)]
        return Volume(array, self.grid.reoriented(orientation))

    def cropped(self, start: Sequence[int], stop: Sequence[int]) -> Volume:
        """Return the voxels from index `start` up to, not including, `stop`. Lossless; a view."""
        grid = self.grid.cropped(start, stop)
        i, j, k = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        return Volume(self.array[:, i, j, k], grid)


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """Return the smallest box of a mask (I, J, K) that holds all that is true in it; None where nothing is."""
    lines = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    if not lines[0].size:
        return None
    i, j, k = (slice(int(line[0]), int(line[-1]) + 1) for line in lines)
    return i, j, k


def orientations_to_axes(step: NDArray[np.float64]) -> tuple[int, ...]:
    """Return, for each axis of the result of an orientation step, the axis of the input that it shows."""
    return tuple(int(axis) for axis in np.argsort(step[:, 0]))


def _invertible(matrix: NDArray[np.float64]) -> bool:
    lengths = np.linalg.norm(matrix, axis=0)
    # The determinant of the unit axes is the volume they span: 1 when perpendicular, 0 when flat.
    return bool(lengths.min() > 0 and abs(np.linalg.det(matrix / lengths)) > 1e-6)


def _corners(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([(x, y, z) for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
