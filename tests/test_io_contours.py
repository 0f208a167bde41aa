from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg.io.contours import fill, trace

masks = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def drawn(text: str) -> np.ndarray:
    """Return the mask of a drawing: one line for each row, # for a voxel."""
    return np.array([[letter == "#" for letter in line] for line in text.split()]).T


def winding(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return how often the polygons wind around each center, voxel by voxel: the other rule, by another way."""
    count = np.zeros(shape, dtype=int)
    for polygon in polygons:
        for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            for i, j in np.ndindex(shape):
                if x1 == x2 and x1 > i:
                    count[i, j] += int(y1 < j < y2) - int(y2 < j < y1)
    return count


@given(masks)
@settings(max_examples=400)
def test_any_mask_comes_back(mask: np.ndarray) -> None:
    polygons = trace(mask)
    np.testing.assert_array_equal(fill(polygons, mask.shape), mask)
    np.testing.assert_array_equal(winding(polygons, mask.shape), mask)


@given(masks)
def test_each_polygon_alone_is_a_group_of_voxels_that_share_edges(mask: np.ndarray) -> None:
    from scipy import ndimage

    groups, count = ndimage.label(mask)
    polygons = trace(mask)
    assert len(polygons) == count
    for polygon in polygons:
        own = fill([polygon], mask.shape)
        (number,) = np.unique(groups[own])
        np.testing.assert_array_equal(own, groups == number)


@given(masks)
def test_points_are_corners_on_the_edges_of_voxels(mask: np.ndarray) -> None:
    for polygon in trace(mask):
        np.testing.assert_array_equal(polygon % 1, 0.5)
        steps = np.roll(polygon, -1, axis=0) - polygon
        np.testing.assert_array_equal((steps != 0).sum(axis=1), 1)  # along one axis each time, never nowhere


@pytest.mark.parametrize(
    ("drawing", "points"),
    [
        ("#", [4]),
        ("###\n###", [4]),
        ("#.\n##", [6]),
        ("#.\n.#", [4, 4]),
        (".#\n#.", [4, 4]),
        # A ring: 4 outside, 4 around the hole, which is walked back to its start, and 2 at the foot of the bridge.
        ("###\n#.#\n###", [11]),
        ("#####\n#...#\n#.#.#\n#...#\n#####", [11, 4]),
        ("...\n...", []),
    ],
)
def test_polygons_by_hand(drawing: str, points: list[int]) -> None:
    assert [len(polygon) for polygon in trace(drawn(drawing))] == points


def test_a_hole_below_a_hole_and_many_of_them() -> None:
    mask = np.ones((3, 2001), dtype=bool)
    mask[1, 1::2] = False
    (polygon,) = trace(mask)
    np.testing.assert_array_equal(fill([polygon], mask.shape), mask)


def test_fill_by_hand() -> None:
    # A triangle with corners 0 0, 4 0 and 0 4: the row j holds the centers with 0 <= i < 4 - j.
    triangle = np.array([[0, 0], [4, 0], [0, 4]], dtype=float)
    expected = np.add.outer(np.arange(6), np.arange(5)) < 4
    np.testing.assert_array_equal(fill([triangle], (6, 5)), expected)
    np.testing.assert_array_equal(fill([triangle[::-1]], (6, 5)), expected)
    # The same, a little off by rounding in a file.
    np.testing.assert_array_equal(fill([triangle + 4e-4 * np.array([[1, -1], [-1, 1], [1, 1]])], (6, 5)), expected)


@given(arrays(float, (7, 2), elements=st.floats(-3, 9)))
def test_polygons_that_reach_beyond_the_slice_are_cut(polygon: np.ndarray) -> None:
    inner = fill([polygon], (4, 5))
    np.testing.assert_array_equal(fill([polygon + 12], (30, 30))[12:16, 12:17], inner)


def test_the_parts_of_a_divided_polygon_share_no_voxel() -> None:
    left, right = (np.array([[a, 0], [b, 0], [b, 3], [a, 3]], dtype=float) for a, b in ((0, 2), (2, 5)))
    assert fill([left, right], (6, 4)).sum() == 15
    assert fill([left], (6, 4)).sum() == 6


def test_no_polygon_fills_nothing() -> None:
    assert not fill([], (3, 4)).any()
