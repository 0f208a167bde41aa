"""From the mask of one slice to closed polygons and back, exactly. Knows indices, no files and no patient.

Polygons run along the edges of voxels, so that they enclose whole voxels and stay half a voxel away from all centers:
every way of filling polygons gives the mask back. Points are fractional indices (i, j) of the slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Polygon = NDArray[np.float64]
Point = tuple[int, int]

SNAP_DECIMALS = 3
"""Decimals of an index that count when polygons are filled, so that rounding in a file decides on no voxel."""


COPY_TOLERANCE = 0.05
"""How far, in voxels, the lines of two copies of a polygon may lie from one another: no wall is as thin as this."""


def trace(mask: Mask) -> list[Polygon]:
    """Return polygons (n, 2) that enclose the voxels of a mask (I, J): corner points only, not closed by a last point.

    Each is the outline of a group of voxels that share edges; groups that touch at a corner are apart. A hole is joined
    to what lies above it by a line that is walked there and back, the "keyhole" of PS3.3 C.8.8.6.3, and is walked
    the other way round than the outline, so that both rules of filling, even-odd and winding, leave it out.
    """
    x, y, above_or_below = _corners(mask)
    left_ends = y[::2] * (len(mask) + 1) + x[::2]
    points: list[Point] = list(zip(x.tolist(), y.tolist(), strict=True))
    outlines: list[Polygon] = []
    hanging: dict[int, list[list[Point]]] = defaultdict(list)
    # What a hole hangs on starts in a row above it: from the last to the first, each ring is whole when it is needed.
    for loop in reversed(_loops(above_or_below)):
        left, top = points[loop[0]]
        if mask[left, top]:
            outlines.append(np.array(_ring(loop, points, hanging), dtype=np.float64) - 0.5)
        else:
            ring = _ring([loop[0], *loop[:0:-1]], points, hanging)
            gaps = np.flatnonzero(~mask[left, :top])
            roof = int(gaps[-1]) + 1 if gaps.size else 0
            edge = int(np.searchsorted(left_ends, roof * (len(mask) + 1) + left, side="right")) - 1
            hanging[edge].append([*ring, ring[0]])
    return outlines[::-1]


def fill(polygons: Sequence[Polygon], shape: tuple[int, int]) -> Mask:
    """Return the mask (I, J) of the voxels whose center lies inside an odd number of closed polygons (n, 2), or on one.

    So polygons that do not overlap add up, and one inside another is a hole. Centers on a line count, to a thousandth
    of a voxel: many programs draw contours through the centers of the outermost voxels.
    """
    if not polygons:
        return np.zeros(shape, dtype=bool)
    starts = np.concatenate(polygons).round(SNAP_DECIMALS)
    ends = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons]).round(SNAP_DECIMALS)
    downwards = (starts[:, 1] > ends[:, 1])[:, None]
    x1, y1 = np.where(downwards, ends, starts).T
    x2, y2 = np.where(downwards, starts, ends).T
    first, last = np.clip(np.ceil(y1), 0, None), np.clip(np.floor(y2), None, shape[1] - 1)
    count = np.where(y1 < y2, np.clip(last - first + 1, 0, None), 0).astype(int)
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    crossing = (x1[edge] + (row - y1[edge]) * (x2 - x1)[edge] / (y2 - y1)[edge]).round(SNAP_DECIMALS)
    # A row through the upper end of an edge crosses the edge that goes on from there.
    crosses = row < y2[edge]
    odd = np.cumsum(_counts(np.ceil(crossing)[crosses], row[crosses], shape), axis=0) % 2 == 1
    level, met = (y1 == y2) & (y1 % 1 == 0), crossing % 1 == 0
    begin = np.concatenate([np.ceil(np.minimum(x1, x2)[level]), crossing[met]])
    behind = np.concatenate([np.floor(np.maximum(x1, x2)[level]), crossing[met]]) + 1
    rows = np.concatenate([y1[level], row[met]])
    on_line = np.cumsum(_counts(begin, rows, shape) - _counts(behind, rows, shape), axis=0) > 0
    inside: Mask = (odd | on_line)[:-1]
    return inside


def distinct(polygons: Sequence[Polygon]) -> list[Polygon]:
    """Return polygons (n, 2) without copies, as some programs export them: two of one would leave nothing inside.

    A copy runs along the same line to COPY_TOLERANCE, wherever it starts, in whichever direction, closed by a last
    point or not, and with other points on the line or not.
    """
    boxes = np.array([[*polygon.min(axis=0), *polygon.max(axis=0)] for polygon in polygons])
    kept: list[int] = []
    for place, polygon in enumerate(polygons):
        alike = np.abs(boxes[kept] - boxes[place]).max(axis=1, initial=0) <= COPY_TOLERANCE
        others = [polygons[other] for other, same in zip(kept, alike, strict=True) if same]
        if not any(_along(polygon, other) and _along(other, polygon) for other in others):
            kept.append(place)
    return [polygons[place] for place in kept]


def _along(polygon: Polygon, other: Polygon) -> bool:
    """Return whether all points of a polygon lie on the line of another, to COPY_TOLERANCE."""
    edges = np.roll(other, -1, axis=0) - other
    lengths = np.maximum((edges**2).sum(axis=1), 1e-12)
    for first in range(0, len(polygon), 64):  # a few at a time, since there may be thousands of both
        offsets = polygon[first : first + 64, None] - other
        share = np.clip((offsets * edges).sum(axis=2) / lengths, 0, 1)
        distances = np.linalg.norm(offsets - share[..., None] * edges, axis=2).min(axis=1)
        if distances.max() > COPY_TOLERANCE:
            return False
    return True


def _counts(column: Polygon, row: Polygon, shape: tuple[int, int]) -> NDArray[np.intp]:
    """Return how often each place (I + 1, J) occurs; columns beyond the slice count at its ends, rows do not."""
    there = (row >= 0) & (row < shape[1])
    places = np.clip(column[there], 0, shape[0]) * shape[1] + row[there]
    return np.bincount(places.astype(int), minlength=(shape[0] + 1) * shape[1]).reshape(-1, shape[1])


def _corners(mask: Mask) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return x, y and the vertical partner of every corner, row by row from left to right.

    Corners 2n and 2n + 1 are the ends of a horizontal edge. Where two voxels touch at a point there are two corners.
    """
    padded = np.pad(mask, 1)
    a, b, c, d = padded[:-1, :-1], padded[1:, :-1], padded[:-1, 1:], padded[1:, 1:]
    turn = a ^ b ^ c ^ d
    touch = (a == d) & (b == c) & (a != b)
    (x, y), (u, v) = np.nonzero(turn), np.nonzero(touch)
    crossed = d[touch]
    goes_right = np.concatenate([(b != d)[turn], np.zeros(len(u), bool), np.ones(len(u), bool)])
    goes_down = np.concatenate([(c != d)[turn], ~crossed, crossed])
    x, y = np.concatenate([x, u, u]), np.concatenate([y, v, v])
    by_row = np.lexsort((goes_right, x, y))
    x, y, goes_down = x[by_row], y[by_row], goes_down[by_row]
    by_column = np.lexsort((goes_down, y, x))
    partner = np.empty_like(by_column)
    partner[by_column[::2]], partner[by_column[1::2]] = by_column[1::2], by_column[::2]
    return x, y, partner


def _loops(partner: NDArray[np.intp]) -> list[list[int]]:
    """Return the corners of every closed line from its leftmost in the top row, to the right first."""
    vertical = partner.tolist()
    unseen = bytearray(b"\1") * len(vertical)
    loops = []
    for start in range(0, len(vertical), 2):
        loop = []
        corner = start
        while unseen[corner]:
            unseen[corner] = unseen[corner ^ 1] = 0
            loop += [corner, corner ^ 1]
            corner = vertical[corner ^ 1]
        if loop:
            loops.append(loop)
    return loops


def _ring(loop: list[int], points: list[Point], hanging: dict[int, list[list[Point]]]) -> list[Point]:
    """Return the points of a closed line, with the holes that hang on its edges walked on the way."""
    ring: list[Point] = []
    for corner, following in pairwise([*loop, loop[0]]):
        ring.append(points[corner])
        if following != corner ^ 1 or corner // 2 not in hanging:
            continue
        leftwards = points[following] < points[corner]
        for hole in sorted(hanging[corner // 2], key=lambda hole: hole[0], reverse=leftwards):
            joint = (hole[0][0], points[corner][1])
            ring += [*([joint] if ring[-1] != joint else []), *hole, joint]
        if ring[-1] == points[following]:
            ring.pop()
    return ring
