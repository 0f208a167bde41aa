from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import make_grid, rotation
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.errors import GeometryError, InputError
from medseg.process.resample import SHRINK_LIMIT, resample, resample_labels
from medseg.volume import Grid, Volume


def ramp(grid: Grid, slope: tuple[float, float, float] = (0.5, -1.25, 2.0)) -> Volume:
    """Return an image whose value at each world position is a linear function of that position."""
    world = grid.to_world(np.stack(np.indices(grid.shape), axis=-1))
    return Volume((world @ np.array(slope) + 3).astype(np.float32)[None], grid)


def as_sitk(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(volume.array[0].T)
    lps = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing(volume.grid.spacing_mm)
    image.SetDirection((lps @ volume.grid.affine[:3, :3] / volume.grid.spacing_mm).ravel().tolist())
    image.SetOrigin((lps @ volume.grid.affine[:3, 3]).tolist())
    return image


def turned_inside(grid: Grid, shape: tuple[int, int, int]) -> Grid:
    """Return a small oblique grid around the center of another."""
    affine = np.eye(4)
    affine[:3, :3] = rotation((20, 10, -15)) * 0.4
    center = grid.to_world((np.asarray(grid.shape) - 1) / 2)
    affine[:3, 3] = center - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("target", ["RAS", "LPS", "PIR", "SAL"])
def test_same_voxels_in_another_order_are_exact_and_keep_their_type(volume, target, order):
    moved = resample(volume, volume.grid.reoriented(target), order=order)
    assert moved.array.dtype == volume.array.dtype
    np.testing.assert_array_equal(moved.array, volume.reoriented(target).array)


def test_a_crop_is_exact(volume):
    part = volume.cropped((1, 2, 0), (5, 4, 4))
    np.testing.assert_array_equal(resample(volume, part.grid, order=3).array, part.array)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["RAS", "LPS", "PIR", "oblique"]),
    spacing=st.tuples(*[st.floats(0.4, 2.0)] * 3),
    orientation=st.sampled_from(["RAS", "LAS", "SPL"]),
)
def test_linear_interpolation_keeps_a_linear_image_inside_the_outer_centers(kind, spacing, orientation):
    image = ramp(make_grid(kind))
    # Beyond that an image is smoothed first, which bends the ends of a ramp.
    assume((image.grid.with_spacing(spacing).spacing_mm / np.asarray(image.grid.spacing_mm)).max() < SHRINK_LIMIT)
    target = image.grid.with_spacing(spacing).reoriented(orientation)
    result = resample(image, target, order=1)
    index = image.grid.to_index(target.to_world(np.stack(np.indices(target.shape), axis=-1)))
    inside = ((index >= 0) & (index <= np.asarray(image.grid.shape) - 1)).all(axis=-1)
    np.testing.assert_allclose(result.array[0][inside], ramp(target).array[0][inside], atol=1e-3)


@pytest.mark.parametrize(("order", "interpolator"), [(0, sitk.sitkNearestNeighbor), (1, sitk.sitkLinear)])
@pytest.mark.parametrize("parallel", [True, False])
def test_simpleitk_agrees_inside_the_field_of_view(volume, order, interpolator, parallel):
    source = volume.with_array(volume.array.astype(np.float32))
    if parallel:
        target = source.grid.with_spacing((1.2, 1.2, 1.2)).reoriented("PIR")
    else:
        target = turned_inside(source.grid, (6, 7, 8))
    ours = resample(source, target, order=order).array[0]
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(as_sitk(source), as_sitk(Volume(np.zeros((1, *target.shape), np.float32), target)),
                      sitk.Transform(), interpolator, float("nan"))
    ).T  # fmt: skip
    index = source.grid.to_index(target.to_world(np.stack(np.indices(target.shape), axis=-1)))
    inside = ((index > 0) & (index < np.asarray(source.grid.shape) - 1)).all(axis=-1)
    tie = (np.abs(index - np.floor(index) - 0.5) < 1e-3).any(axis=-1)
    chosen = inside & (~tie if order == 0 else True)
    assert chosen.sum() > 50
    np.testing.assert_allclose(ours[chosen], theirs[chosen], atol=0.05)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
def test_the_separable_cubic_spline_is_scipys(factor):
    image = Volume(
        np.random.default_rng(3).normal(size=(1, 14, 17, 11)).astype(np.float32), make_grid("RAS", (14, 17, 11))
    )
    target = image.grid.with_spacing(np.asarray(image.grid.spacing_mm) * factor)
    index = image.grid.to_index(target.to_world(np.stack(np.indices(target.shape), axis=-1)))
    index = np.clip(index, 0, np.asarray(image.grid.shape) - 1)
    expected = ndimage.map_coordinates(
        image.array[0].astype(np.float64), np.moveaxis(index, -1, 0), order=3, mode="mirror"
    )
    np.testing.assert_allclose(resample(image, target, order=3).array[0], expected, atol=1e-4)


def test_the_general_path_agrees_with_the_separable_one(monkeypatch):
    image = Volume(
        np.random.default_rng(3).normal(size=(2, 30, 40, 20)).astype(np.float32), make_grid("LPS", (30, 40, 20))
    )
    target = image.grid.with_spacing((1.0, 1.2, 2.0)).cropped((1, 2, 3), (20, 30, 15))
    fast = resample(image, target, order=3)
    monkeypatch.setattr("medseg.process.resample.parallel_axes", lambda *_: None)
    monkeypatch.setattr("medseg.process.resample.BLOCK_VOXELS", 28 * 12 * 4)  # five blocks
    np.testing.assert_allclose(resample(image, target, order=3).array, fast.array, atol=2e-3)


def test_a_fine_checkerboard_shrinks_to_gray_and_not_to_a_pattern():
    grid = Grid((32, 32, 32), np.eye(4))
    board = Volume((np.indices(grid.shape).sum(axis=0) % 2 * 100.0)[None], grid)
    gray = resample(board, grid.with_spacing((4, 4, 4)), order=3).array
    assert np.abs(gray - 50).max() < 1.0
    assert np.ptp(resample(board, grid.with_spacing((4, 4, 4)), order=0).array) == 0  # sampling alone sees one color


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["RAS", "PIR"]), order=st.sampled_from([1, 3]))
def test_constant_regions_stay_constant_and_nothing_else_changes(seed, kind, order):
    rng = np.random.default_rng(seed)
    grid = make_grid(kind, tuple(rng.integers(20, 70, size=3).tolist()))
    array = np.full((2, *grid.shape), -1024, np.int16)
    start = rng.integers(0, np.array(grid.shape) - 4)
    array[0, start[0] : start[0] + 4, start[1] : start[1] + 4, start[2] : start[2] + 4] = rng.integers(-9, 9, (4, 4, 4))
    target = grid.reoriented("SAR").with_spacing(np.array(grid.reoriented("SAR").spacing_mm) * rng.uniform(0.7, 2.2))
    image = Volume(array, grid)
    result = resample(image, target, order=order).array
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg.process.resample.settle_constants", lambda *_: None)
        unsettled = resample(image, target, order=order).array
    np.testing.assert_allclose(result, unsettled, atol=1024 * 2e-6)
    assert (result[1] == -1024).all()
    index = grid.to_index(target.to_world(np.stack(np.indices(target.shape), axis=-1)))
    far = (np.maximum(start - index, index - start - 3) > 40).any(axis=-1)
    assert (result[0][far] == -1024).all()


def test_outside_the_field_of_view_is_the_edge_or_the_fill():
    image = Volume(np.full((1, 4, 4, 4), 7.0), Grid((4, 4, 4), np.eye(4)))
    shifted = np.eye(4)
    shifted[0, 3] = 2.6  # centers at x = 2.6, 3.6, 4.6, 5.6; the field of view ends at 3.5
    beyond = Grid((4, 4, 4), shifted)
    assert (resample(image, beyond, order=1).array == 7).all()
    filled = resample(image, beyond, order=1, fill=-1).array
    assert (filled[:, 0] == 7).all()
    assert (filled[:, 1:] == -1).all()


def test_labels_win_by_their_share_and_ties_go_to_the_lower_value():
    # Along x: 0 0 3 3, sampled half way between: shares of 0.5 each at the border, so the lower value wins.
    labels = Volume(np.array([0, 0, 3, 3], np.uint8).reshape(1, 4, 1, 1), Grid((4, 1, 1), np.eye(4)))
    fine = labels.grid.with_spacing((0.5, 1, 1))  # centers at -0.25, 0.25, 0.75, 1.25, 1.75 ...
    assert resample_labels(labels, fine).array[0, :, 0, 0].tolist() == [0, 0, 0, 0, 3, 3, 3, 3]
    half = np.diag([1.0, 1, 1, 1])
    half[0, 3] = 0.5  # centers at 0.5, 1.5 (the tie), 2.5
    assert resample_labels(labels, Grid((3, 1, 1), half)).array[0, :, 0, 0].tolist() == [0, 0, 3]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    spacing=st.tuples(*[st.floats(0.5, 3.0)] * 3),
    kind=st.sampled_from(["RAS", "LPS", "oblique"]),
)
def test_labels_are_the_argmax_of_interpolated_one_hot_maps(seed, spacing, kind):
    values = np.array([0, 2, 5, 70000])
    labels = Volume(
        np.random.default_rng(seed).choice(values, size=(1, 6, 7, 5)).astype(np.int32), make_grid(kind, (6, 7, 5))
    )
    target = labels.grid.with_spacing(spacing)
    result = resample_labels(labels, target)
    shares = np.stack(
        [resample(labels.with_array((labels.array == v).astype(np.float32)), target, order=1).array for v in values]
    )
    won = np.take_along_axis(shares, np.searchsorted(values, result.array)[None], axis=0)[0]
    assert result.array.dtype == np.int32
    assert (won >= shares.max(axis=0) - 1e-5).all()


def test_grids_that_do_not_overlap_are_refused(volume):
    affine = volume.grid.affine.copy()
    affine[:3, 3] += 1000
    with pytest.raises(GeometryError, match="do not overlap"):
        resample(volume, Grid(volume.grid.shape, affine), fill=0)
    affine[:3, :3] = rotation((5, 6, 7)) @ affine[:3, :3]
    with pytest.raises(GeometryError, match="do not overlap"):
        resample(volume, Grid(volume.grid.shape, affine), fill=0)


def test_an_unknown_order_is_refused(volume):
    with pytest.raises(GeometryError, match="order 0, 1 or 3; here it is 2"):
        resample(volume, volume.grid, order=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_no_numbers_are_refused(bad):
    array = np.zeros((1, 5, 5, 5), np.float32)
    array[0, 2, 2, 2] = bad
    image = Volume(array, Grid((5, 5, 5), np.eye(4)))
    with pytest.raises(InputError, match="NaN or infinite"):
        resample(image, image.grid.with_spacing((0.7, 0.7, 0.7)))
