"""Which voxels of a scan were measured, and which were filled up: padding, a face taken off, corners of a turned scan.

What fills is exactly one value in a solid region; what a scanner measures has noise. The scan at hand says so, whatever
other scans are like.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.volume import box_of

Channel = NDArray[np.generic]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

SMALLEST_PLANE = 9
"""Voxels of a plane, at least, that have one value by more than chance."""

CORNERS = 2
"""Corners of a scan, at least, that have the value which fills it up: those of one edge, as where a face was."""

NEAR = 3
"""Steps from a solid region within which a voxel of its value belongs to it: thin ends of corners."""

FEW = 0.05
"""Of as many voxels as are filled up, so many others of that value are filled up too, wherever they lie."""

LAYERS = 4
"""Fillings that lie within each other: a scan with a round field of view that was padded has two."""


def measured(channel: Channel) -> Mask | None:
    """Return where a channel (I, J, K) was measured; None where that is everywhere.

    Not measured are outer planes of one value, whatever it is; and of the least value, of 0 and of a value of two
    corners whole planes, and solid regions (that cubes of 3 x 3 x 3 voxels make up). Regions of the last two count
    where they reach the border. A channel in which that leaves fewer than two values counts as measured everywhere.
    """
    inside = np.ones(channel.shape, bool)
    for _ in range(LAYERS):
        box = _without_planes(channel, box_of(inside))
        part, kept = channel[box], inside[box].copy()
        inside[:] = False
        inside[box] = kept
        filled = _filled(part, kept)
        if not filled.any():
            break
        inside[box] &= ~filled
    values = channel[inside]
    return None if inside.all() or not values.size or values.min() == values.max() else inside


def box_around(masks: Sequence[Mask | None], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the (start, stop) indices of the smallest part that holds all that some mask has; None is a full mask."""
    box = None if any(mask is None for mask in masks) else box_of(reduce(np.logical_or, masks))  # type: ignore[arg-type]
    if box is None:
        return (0, 0, 0), shape
    return tuple(part.start for part in box), tuple(part.stop for part in box)


def _without_planes(channel: Channel, box: Box | None) -> Box:
    """Return the part of a box within the outer planes that have one value throughout."""
    ends = list(box or (slice(0, size) for size in channel.shape))
    for axis in range(3):
        lines = np.moveaxis(channel[tuple(ends)], axis, 0)
        if lines[:1].size < SMALLEST_PLANE:
            continue
        first, last = 0, len(lines)
        while first < last - 1 and lines[first].min() == lines[first].max():
            first += 1
        while last > first + 1 and lines[last - 1].min() == lines[last - 1].max():
            last -= 1
        ends[axis] = slice(ends[axis].start + first, ends[axis].start + last)
    return ends[0], ends[1], ends[2]


def _filled(channel: Channel, inside: Mask) -> Mask:
    """Return what of a channel is filled up by solid regions, where nothing but `inside` is looked at."""
    values = channel[inside]
    least, most = (values.min(), values.max()) if values.size else (0, 0)
    result = np.zeros(channel.shape, bool)
    ends = tuple(slice(None, None, max(1, size - 1)) for size in channel.shape)
    corners, counts = np.unique(channel[ends], return_counts=True)
    others = {0} if most != 0 else set()
    for value in {least, *others, *corners[counts >= CORNERS].tolist()}:
        mask = (channel == value) & inside
        filled = _planes(mask)
        solid = _solid(mask)
        if solid.any():
            filled |= solid if value == least else _at_border(solid, inside)
        if np.count_nonzero(mask) <= (1 + FEW) * np.count_nonzero(filled):
            filled = mask
        result |= filled
    return result


def _planes(mask: Mask) -> Mask:
    """Return the planes, along any axis, that a mask has altogether."""
    result = np.zeros(mask.shape, bool)
    for axis in range(3):
        lines, planes = (np.moveaxis(one, axis, 0) for one in (mask, result))
        planes[lines.all(axis=(1, 2)) & (lines[0].size >= SMALLEST_PLANE)] = True
    return result


def _solid(mask: Mask) -> Mask:
    """Return the voxels that lie in a cube of 3 x 3 x 3 voxels of the mask, and those of the mask near them.

    A cube may reach beyond the scan: what fills up a thin wedge at its border goes on there. Eight voxels are worked on
    at a time, as the bits of a byte.
    """
    bits, length = np.packbits(mask, axis=-1), mask.shape[-1]
    result = ~_grown(np.packbits(~mask, axis=-1)) & bits
    for _ in range(1 + NEAR if result.any() else 0):
        result = _grown(result) & bits
    return np.unpackbits(result, axis=-1, count=length).view(bool)


def _grown(bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a mask with the 26 neighbors of its voxels; the last axis is packed."""
    grown = np.asarray(bits | bits >> 1 | bits << 1, np.uint8)
    grown[..., 1:] |= bits[..., :-1] << 7
    grown[..., :-1] |= bits[..., 1:] >> 7
    for axis in range(2):
        before = grown.copy()
        lines, old = (np.moveaxis(one, axis, 0) for one in (grown, before))
        lines[1:] |= old[:-1]
        lines[:-1] |= old[1:]
    return grown


def _at_border(solid: Mask, inside: Mask) -> Mask:
    """Return the connected parts of a mask that reach the border of the scan, or what is filled up beside it."""
    parts, _ = ndimage.label(solid)
    near = ~ndimage.binary_erosion(inside)  # with its border
    return np.asarray(np.isin(parts, np.setdiff1d(parts[near], 0)))
