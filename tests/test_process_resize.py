"""Resampling as nnU-Net does it, judged by scipy's zoom on half-pixel grids, which scikit-image's resize calls."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_grid, rotation
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from medseg.errors import InputError
from medseg.process.resample import AxisPositions, resample
from medseg.process.resize import nearest, resize, resize_labels, separate_axis
from medseg.volume import Grid, Volume


def noise(shape: tuple[int, int, int], spacing: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    voxels = np.random.default_rng(3).normal(100, 40, size=(2, *shape)).astype(np.float32)
    return Volume(voxels, Grid(shape, np.diag([*spacing, 1.0])))


def zoomed(image: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """Return what scikit-image's resize(mode="edge", anti_aliasing=False, clip=True) gives."""
    factors = np.divide(shape, image.shape)
    result = ndimage.zoom(image.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    assert result.shape == tuple(shape)
    return np.clip(result, image.min(), image.max())


@given(
    shape=st.tuples(*[st.integers(1, 23)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 2.5)] * 3),
    order=st.sampled_from([1, 3]),
)
def test_all_axes_together_are_what_scipy_zooms_to(shape, spacing, order):
    volume = noise(shape)
    target = volume.grid.with_spacing(spacing)
    result = resize(volume, target, order=order, separate=None)
    assert result.grid is target
    for channel, expected in zip(result.array, volume.array, strict=True):
        np.testing.assert_allclose(channel, zoomed(expected, target.shape, order), atol=1e-3)


@pytest.mark.parametrize("shape_after", [(14, 18, 9), (14, 18, 3), (14, 18, 4), (10, 12, 9)])
def test_a_coarse_axis_is_resampled_by_itself(shape_after):
    volume = noise((10, 12, 6), (1, 1, 4))
    target = volume.grid.with_spacing(np.array([10, 12, 24]) / shape_after)
    result = resize(volume, target, order=3, separate=3).array
    rows = (2 * np.arange(shape_after[2]) + 1) * 6 // (2 * shape_after[2])
    for channel, image in zip(result, volume.array, strict=True):
        slices = [zoomed(image[:, :, row], shape_after[:2], 3) for row in rows]
        np.testing.assert_allclose(channel, np.stack(slices, axis=2), atol=1e-3)


def test_values_stay_within_the_range_of_their_slice():
    volume = noise((10, 12, 4), (1, 1, 4))
    target = volume.grid.with_spacing((0.7, 0.7, 4))
    result = resize(volume, target, order=3, separate=3).array
    assert (result.max(axis=(1, 2)) <= volume.array.max(axis=(1, 2))).all()
    smooth = resample(volume, target, order=3).array
    assert (smooth.max(axis=(1, 2)) > volume.array.max(axis=(1, 2))).any()


@pytest.mark.parametrize(
    ("before", "after", "axis"),
    [
        ((1, 1, 4), (1, 1, 1), 2),
        ((1, 1, 3), (1, 1, 1), None),  # three times is not more than three times
        ((1, 1, 1), (4, 1, 1), 0),
        ((4, 1, 1), (1, 1, 4), 0),  # that of the first spacing
        ((0.3, 1.2, 1.2), (1, 1, 4), None),  # no one axis is the coarse one, and the second spacing is not looked at
    ],
)
def test_the_axis_that_is_resampled_by_itself(before, after, axis):
    assert separate_axis(before, after, 3) == axis
    assert separate_axis(before, after, None) is None


def test_halfway_between_two_voxels_the_upper_one_is_the_nearest():
    axis = AxisPositions(0, np.array([0.5, 1.5, 2.5, 2.4999999999999, -0.5, 0.49]), 1.0)
    assert nearest(axis).positions.tolist() == [1, 2, 3, 3, 0, 0]


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_same_voxels_in_another_order_stay_what_they_are(order):
    grid = make_grid("PIR")
    volume = Volume(np.random.default_rng(1).integers(0, 99, (1, *grid.shape)), grid)
    target = grid.reoriented("LAS")
    np.testing.assert_array_equal(resize(volume, target, order=order, separate=3).array, volume.reoriented("LAS").array)


def test_turned_axes_are_resampled_without_a_separate_axis():
    volume = noise((9, 8, 7))
    affine = volume.grid.affine.copy()
    affine[:3, :3] = rotation((0, 0, 20)) @ affine[:3, :3]
    target = Grid((9, 8, 7), affine)
    np.testing.assert_array_equal(
        resize(volume, target, order=1, separate=3).array, resample(volume, target, order=1).array
    )


def test_infinite_voxels_are_refused():
    volume = noise((4, 4, 4))
    volume.array[0, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        resize(volume, volume.grid.with_spacing((0.7, 1, 1)), order=3, separate=None)


def blocks(row: list[int]) -> Volume:
    """Return a label map that changes along the first axis alone."""
    array = np.tile(np.array(row, np.uint8)[:, None, None], (1, 3, 2))
    return Volume(array[None], Grid(array.shape, np.eye(4)))


def test_of_equal_shares_the_label_of_the_nearest_voxel_wins():
    # Two voxels make three: the middle one lies on the border, where scipy's nearest is the upper voxel.
    for row in ([1, 2], [2, 1]):
        labels = blocks(row)
        found = resize_labels(labels, labels.grid.with_spacing((2 / 3, 1, 1)), separate=None).array[0, :, 0, 0]
        middle = ndimage.zoom(np.array(row), 1.5, order=0, mode="nearest", grid_mode=True)[1]
        assert found.tolist() == [row[0], middle, row[1]]


def test_the_largest_share_wins_though_it_is_below_one_half():
    array = np.zeros((2, 2, 2), np.uint8)
    array[0] = [[3, 3], [1, 2]]
    array[1] = [[3, 4], [5, 6]]
    labels = Volume(array[None], Grid((2, 2, 2), np.eye(4)))
    found = resize_labels(labels, labels.grid.with_spacing((2, 2, 2)), separate=None)
    assert found.array.tolist() == [[[[3]]]]  # three eighths, the others one each
    assert found.array.dtype == np.uint8


def test_labels_of_a_flipped_grid_are_the_same_labels_in_the_world():
    array = np.random.default_rng(8).integers(0, 4, (7, 9, 6)).astype(np.int16)
    labels = Volume(array[None], Grid((7, 9, 6), np.diag([1.0, 1.1, 3.0, 1.0])))
    grid = labels.grid.with_spacing((0.8, 0.9, 1.7))
    there = resize_labels(labels, grid, separate=2.5)
    turned = resize_labels(labels, grid.reoriented("PLS"), separate=2.5)
    back = resample(turned, grid, order=0)
    assert (back.array != there.array).mean() < 0.02  # ties alone


def test_a_coarse_axis_goes_to_the_nearest_label():
    array = np.random.default_rng(8).integers(0, 3, (4, 5, 3)).astype(np.uint8)
    labels = Volume(array[None], Grid((4, 5, 3), np.diag([1.0, 1.0, 5.0, 1.0])))
    found = resize_labels(labels, labels.grid.with_spacing((1, 1, 2.5)), separate=3.0)
    np.testing.assert_array_equal(found.array[0], array.repeat(2, axis=2))
