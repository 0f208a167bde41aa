"""From the planes of a DICOM series to one affine. Knows headers' numbers, no files.

A *plane* is the affine of one slice: it takes (column, row, 0) of a pixel to RAS+ mm, and its third column is the unit
normal. DICOM's own axes (LPS: x grows to the left, y to the back) end in `slice_plane`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Affine

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

POSITION_TOLERANCE_MM = 0.02
"""How far a slice may lie from the equally spaced line, and its edges from those of the first slice.

Positions written with two decimals stray from the line by up to 0.01 mm on each axis, 0.017 mm in space; scanners that
write more decimals stray by less than 0.001 mm. Where slices are closer than 0.2 mm, a tenth of their step is allowed.
"""

LARGEST_GAP_MM = 5.0
"""Irregular steps up to this length may be interpolated onto a regular grid; across a wider one nothing is invented."""

SAME_POSITION_MM = 1e-3
"""Slices closer than this along the normal count as one position."""

COSINE_TOLERANCE = 2e-3
"""How far direction cosines may stray from unit length and a right angle: rounding to three decimals passes."""

STEEPEST_TILT_DEG = 45
"""Gantries tilt by up to 30 degrees. Beyond this, the positions of a series contradict its orientation."""


class Problem(NamedTuple):
    """Why a series cannot be read: a code for machines and a text for people."""

    reason: str
    text: str


def slice_plane(
    position: Sequence[float], orientation: Sequence[float], pixel_spacing: Sequence[float]
) -> Affine | None:
    """Return the plane of a slice, or None where the two directions are not perpendicular unit vectors.

    Takes ImagePositionPatient, ImageOrientationPatient and PixelSpacing, whose first number is the distance between
    rows, that is along a column. The directions are scaled to unit length. Source: PS3.3 C.7.6.2.1.1 and 10.7.1.3.
    """
    # Plain numbers, since numpy takes ten times as long for so few, and a batch has a million slices.
    row_step, column_step = pixel_spacing
    lengths = math.hypot(*orientation[:3]), math.hypot(*orientation[3:])
    cosine = sum(a * b for a, b in zip(orientation[:3], orientation[3:], strict=True))
    stray = max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(cosine))
    if not stray <= COSINE_TOLERANCE or not min(row_step, column_step) > 1e-6:
        return None
    a, b, c = (part / lengths[0] for part in orientation[:3])
    d, e, f = (part / lengths[1] for part in orientation[3:])
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    length = math.hypot(*normal)
    columns = zip((a, b, c), (d, e, f), normal, position, strict=True)
    rows = [[i * column_step, j * row_step, k / length, mm] for i, j, k, mm in columns]
    plane: Affine = LPS_TO_RAS @ np.array([*rows, [0, 0, 0, 1]])
    return plane


def order_along_normal(planes: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the order of the planes (n, 4, 4) along the normal of the first.

    InstanceNumber has no say: only positions say where a slice lies.
    """
    heights_mm = planes[:, :3, 3] @ planes[0, :3, 2]
    return np.argsort(heights_mm, kind="stable")


def stack_affine(planes: NDArray[np.float64], thickness_mm: float) -> Affine:
    """Return the affine of the ordered planes (n, 4, 4): k steps evenly from the first position to the last.

    A tilted stack gets a sheared affine. A single slice steps by its thickness along its normal.
    """
    affine: Affine = planes[0].copy()
    if len(planes) > 1:
        affine[:3, 2] = (planes[-1, :3, 3] - planes[0, :3, 3]) / (len(planes) - 1)
    else:
        affine[:3, 2] *= thickness_mm
    return affine


def regular_stack(planes: NDArray[np.float64], shape: tuple[int, int]) -> tuple[Affine, int] | None:
    """Return the affine and number of evenly spaced slices that stand for ordered planes with irregular steps.

    They reach exactly from the first position to the last, about as close as the closest planes, but no closer than
    half the usual step. None where that would guess: planes that are not parallel, that repeat, that stray from one
    line or have a step above LARGEST_GAP_MM, and stacks from which slices are missing.
    """
    problem = stack_problem(planes, shape, 1.0)
    positions = planes[:, :3, 3]
    way = positions[-1] - positions[0]
    length_mm = float(np.linalg.norm(way))
    if problem is None or problem.reason != "irregular_spacing" or length_mm == 0:
        return None
    along_mm = (positions - positions[0]) @ way / length_mm
    astray_mm = np.linalg.norm(positions - positions[0] - np.outer(along_mm, way) / length_mm, axis=1).max()
    steps_mm = np.diff(along_mm)
    tilt = _tilt_problem(float(planes[0, :3, 2] @ way), length_mm)
    if astray_mm > POSITION_TOLERANCE_MM or tilt or steps_mm.max() > LARGEST_GAP_MM:
        return None
    step_mm = max(float(steps_mm.min()), float(np.median(steps_mm)) / 2)
    count = round(length_mm / step_mm) + 1
    affine: Affine = planes[0].copy()
    affine[:3, 2] = way / (count - 1)
    return affine, count


def stack_problem(planes: NDArray[np.float64], shape: tuple[int, int], thickness_mm: float) -> Problem | None:
    """Return why the ordered planes (n, 4, 4) of `shape` (columns, rows) are no stack, or None where they are one."""
    if len(planes) > 1:
        return _plane_problem(planes, shape) or _position_problem(planes)
    if thickness_mm > 0:
        return None
    return Problem(
        "single_slice",
        "The series is one slice, and neither SpacingBetweenSlices nor SliceThickness says how thick it is.",
    )


def parallel(first: Affine, other: Affine, shape: tuple[int, int]) -> bool:
    """Return whether two slices of `shape` (columns, rows) have one orientation and pixel spacing, to the tolerance."""
    return _plane_problem(np.stack([first, other]), shape) is None


def stack_measures(planes: NDArray[np.float64]) -> dict[str, float]:
    """Return what was measured on ordered planes (n, 4, 4): steps, tilt and shear.

    `step_min_mm` and `step_max_mm` are distances along the normal. `tilt_deg` is the angle between the normal and the
    way from the first slice to the last, `shear_mm` how far that way leads aside. Tags of a gantry's tilt have no say.
    """
    way = planes[-1, :3, 3] - planes[0, :3, 3]
    normal = planes[0, :3, 2]
    steps_mm = np.diff(planes[:, :3, 3] @ normal)
    aside_mm = float(np.linalg.norm(way - (way @ normal) * normal))
    return {
        "step_min_mm": float(steps_mm.min()),
        "step_max_mm": float(steps_mm.max()),
        "tilt_deg": float(np.degrees(np.arctan2(aside_mm, abs(way @ normal)))),
        "shear_mm": aside_mm,
    }


def _plane_problem(planes: NDArray[np.float64], shape: tuple[int, int]) -> Problem | None:
    spacing_mm = np.linalg.norm(planes[:, :3, :2], axis=1)
    directions = planes[:, :3, :2] / spacing_mm[:, None]
    turned_mm = float((np.linalg.norm(directions - directions[0], axis=1) * spacing_mm[0] * shape).max())
    if turned_mm > POSITION_TOLERANCE_MM:
        return Problem(
            "mixed_orientation",
            f"The slices are not parallel: their edges diverge by up to {turned_mm:.2f} mm "
            f"({POSITION_TOLERANCE_MM} mm is allowed). Pass those of one orientation.",
        )
    if float((np.abs(spacing_mm - spacing_mm[0]) * shape).max()) > POSITION_TOLERANCE_MM:
        low, high = spacing_mm.min(), spacing_mm.max()
        return Problem(
            "mixed_pixel_spacing",
            f"The slices have different pixel spacings, from {low:.4f} to {high:.4f} mm. Pass those of one.",
        )
    return None


def _position_problem(planes: NDArray[np.float64]) -> Problem | None:
    count = len(planes)
    positions = planes[:, :3, 3]
    steps_mm = np.diff(positions @ planes[0, :3, 2])
    repeated = int((steps_mm <= SAME_POSITION_MM).sum())
    if repeated:
        return Problem(
            "duplicate_positions",
            f"The {count} slices lie at only {count - repeated} positions along their normal, "
            "so they are more than one stack.",
        )
    line = np.linspace(positions[0], positions[-1], count)
    off_mm = float(np.linalg.norm(positions - line, axis=1).max())
    allowed_mm = min(POSITION_TOLERANCE_MM, steps_mm.mean() / 10)
    if off_mm <= allowed_mm:
        return _tilt_problem(float(steps_mm.mean()), float(np.linalg.norm(line[1] - line[0])))
    usual_mm, missing = _missing(steps_mm)
    if 0 < missing < count / 3:
        return Problem(
            "missing_slice",
            f"{missing} of {count + missing} slices are missing: slices lie {usual_mm:.2f} mm apart, "
            f"but {steps_mm.max():.2f} mm at the widest gap. Fetch the complete series.",
        )
    return Problem(
        "irregular_spacing",
        f"The slices are not equally spaced: they lie {steps_mm.min():.2f} to {steps_mm.max():.2f} mm apart, and one "
        f"lies {off_mm:.2f} mm from where equal steps would put it ({allowed_mm:.2g} mm is allowed). "
        f"Pass an equally spaced part of them; a pipeline interpolates steps of up to {LARGEST_GAP_MM:g} mm.",
    )


def _tilt_problem(along_normal_mm: float, step_mm: float) -> Problem | None:
    tilt = np.degrees(np.arccos(min(1.0, along_normal_mm / step_mm)))
    if tilt <= STEEPEST_TILT_DEG:
        return None
    return Problem(
        "steep_tilt",
        f"The slices are stacked {tilt:.0f} degrees off their normal, more than the {STEEPEST_TILT_DEG} degrees that a "
        "gantry could tilt, so their positions and orientation contradict each other. Export the original series.",
    )


def _missing(steps_mm: NDArray[np.float64]) -> tuple[float, int]:
    """Return the usual step, and how many slices would make all steps equal; 0 where none would."""
    usual = float(np.median(steps_mm[steps_mm < 1.5 * steps_mm.min()]))
    times = np.round(steps_mm / usual)
    fits = np.abs(steps_mm - times * usual).max() <= 2 * POSITION_TOLERANCE_MM
    return usual, int((times - 1).sum()) if fits else 0
