from __future__ import annotations

import numpy as np
import pytest
from conftest import make_grid
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from medseg.errors import UsageError
from medseg.process.cleanup import drop_small, fill_holes, keep_largest, keep_largest_piece
from medseg.volume import Grid, Volume


def row(*values: int) -> Volume:
    """Return labels in a row of voxels of 1 x 1 x 10 mm."""
    return Volume(np.array(values, np.uint8)[None, :, None, None], Grid((len(values), 1, 1), np.diag([1, 1, 10, 1.0])))


def shell(value: int = 2) -> Volume:
    """Return a 3 x 3 x 3 cube of a value with a hole in the middle, in 5 x 5 x 5 voxels."""
    array = np.zeros((1, 5, 5, 5), np.uint8)
    array[0, 1:4, 1:4, 1:4] = value
    array[0, 2, 2, 2] = 0
    return Volume(array, Grid((5, 5, 5), np.eye(4)))


def test_the_largest_piece_stays():
    labels = row(1, 1, 0, 1, 1, 1, 0, 1, 2, 0, 2)
    assert keep_largest(labels, [1]).array.ravel().tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 2, 0, 2]
    assert keep_largest(labels, [1, 2]).array.ravel().tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 2, 0, 0]
    assert keep_largest(labels, []).array.ravel().tolist() == labels.array.ravel().tolist()
    assert keep_largest(labels, [7]).array.ravel().tolist() == labels.array.ravel().tolist()


def test_pieces_that_share_an_edge_alone_are_two():
    labels = Volume(np.array([[[[1], [0]], [[0], [1]]]], np.uint8), Grid((2, 2, 1), np.eye(4)))
    assert keep_largest(labels, [1]).array.ravel().tolist() == [1, 0, 0, 0]


def test_holes_are_filled_and_other_labels_in_them_stay():
    labels = shell()
    assert fill_holes(labels, [2]).array[0, 2, 2, 2] == 2
    assert fill_holes(labels, [1]).array[0, 2, 2, 2] == 0
    labels.array[0, 2, 2, 2] = 5
    assert fill_holes(labels, [2]).array[0, 2, 2, 2] == 5
    labels.array[0, 2, 2, 2:] = 0  # open to one side
    assert fill_holes(labels, [2]).array[0, 2, 2, 2] == 0


def test_what_is_too_small_goes():
    labels = row(1, 1, 0, 2, 2, 2)  # 0.02 ml of 1 and 0.03 ml of 2
    assert drop_small(labels, [1, 2], 0.025).array.ravel().tolist() == [0, 0, 0, 2, 2, 2]
    assert drop_small(labels, [1, 2], 0.02).array.ravel().tolist() == labels.array.ravel().tolist()
    with pytest.raises(UsageError, match=r"positive number of ml; here it is 0\."):
        drop_small(labels, [1], 0)


@pytest.mark.parametrize("value", [65535, 70_000, 2_000_000_000, 3_000_000_000, 2**40])
def test_labels_of_any_size(value):
    labels = shell()
    labels = labels.with_array(labels.array.astype(np.uint64) // 2 * value)
    labels.array[0, 0, 0, 0] = value
    assert np.count_nonzero(keep_largest(labels, [value]).array) == 26
    assert np.count_nonzero(fill_holes(labels, [value]).array) == 28
    assert np.count_nonzero(drop_small(labels, [value], 1).array) == 0


@given(arrays(np.uint8, (1, 6, 5, 4), elements=st.integers(0, 3)))
def test_properties_on_any_labels(array):
    labels = Volume(array, make_grid("oblique", (6, 5, 4)))
    before = array.copy()
    kept, filled = keep_largest(labels, [1, 2]), fill_holes(labels, [1])
    assert (array == before).all()
    assert (kept.array[array == 3] == 3).all()
    for value in (1, 2):
        pieces, count = ndimage.label(array[0] == value)
        assert ndimage.label(kept.array[0] == value)[1] == min(count, 1)
        sizes = np.bincount(pieces.ravel())[1:]
        assert np.count_nonzero(kept.array == value) == max(sizes, default=0)
    assert (filled.array[array > 0] == array[array > 0]).all()
    assert np.array_equal(filled.array[0] == 1, ndimage.binary_fill_holes(array[0] == 1) & (array[0] <= 1))
    for result in (kept, filled):
        assert result.array.dtype == array.dtype
        assert result.grid is labels.grid


def test_the_largest_piece_of_labels_taken_together():
    labels = np.zeros((7, 3, 1), np.uint8)
    labels[0, 0] = 1
    labels[1, 1] = 2  # touches the first at an edge
    labels[3:6, 0] = 3
    labels[6, 2] = 1
    keep_largest_piece(labels, (1, 2))
    assert (labels[0, 0], labels[1, 1], labels[6, 2], (labels == 3).sum()) == (1, 2, 0, 3)
    two = np.zeros((5, 1, 1), np.uint8)
    two[[0, 4]] = 1
    keep_largest_piece(two, (1,))
    assert two.sum() == 2  # of one size: nothing says which is right
