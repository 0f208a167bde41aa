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
    # A triangle with corners 0 0, 4 0 and 0 4 holds the centers with i + j <= 4, the last five on its long side.
    triangle = np.array([[0, 0], [4, 0], [0, 4]], dtype=float)
    expected = np.add.outer(np.arange(6), np.arange(5)) <= 4
    np.testing.assert_array_equal(fill([triangle], (6, 5)), expected)
    np.testing.assert_array_equal(fill([triangle[::-1]], (6, 5)), expected)
    # The same, a little smaller by rounding in a file.
    np.testing.assert_array_equal(fill([(triangle - 1) * (1 - 1e-4) + 1], (6, 5)), expected)
    # Half a voxel down, only j = 1, 2, 3 and 4 are in it: 0.5 below the lines i + j = 4.5 and j = 0.5.
    moved = np.add.outer(np.arange(6), np.arange(5)) <= 4.5
    moved[:, 0] = False
    np.testing.assert_array_equal(fill([triangle + np.array([0, 0.5])], (6, 5)), moved)


@given(st.tuples(*[st.integers(0, 5)] * 4))
def test_contours_through_the_outermost_centers_hold_them(ends: tuple[int, int, int, int]) -> None:
    i, width, j, height = ends
    box = np.array([[i, j], [i + width, j], [i + width, j + height], [i, j + height]], dtype=float)
    expected = np.zeros((12, 12), dtype=bool)
    expected[i : i + width + 1, j : j + height + 1] = True
    np.testing.assert_array_equal(fill([box], expected.shape), expected)


@given(arrays(float, (7, 2), elements=st.floats(-3, 9)))
def test_polygons_that_reach_beyond_the_slice_are_cut(polygon: np.ndarray) -> None:
    inner = fill([polygon], (4, 5))
    np.testing.assert_array_equal(fill([polygon + 12], (30, 30))[12:16, 12:17], inner)


def test_two_polygons_add_up_and_one_inside_another_is_a_hole() -> None:
    one, other, inner = (np.array([[a, a], [b, a], [b, b], [a, b]]) - 0.5 for a, b in ((0, 2), (3, 9), (5, 8)))
    assert fill([one, other], (9, 9)).sum() == 4 + 36
    assert fill([other, inner], (9, 9)).sum() == 36 - 9


def test_no_polygon_fills_nothing() -> None:
    assert not fill([], (3, 4)).any()
