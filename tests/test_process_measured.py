from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from medseg.process.measured import NEAR, _solid, box_around, measured

SCAN = np.random.default_rng(0).normal(100, 10, (12, 14, 16)).astype(np.float32)


@given(st.integers(0, 1000), st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 3), st.floats(-2000, 300))
def test_padding_of_any_width_side_and_value_is_not_measured(seed, widths, value):
    scan = np.random.default_rng(seed).normal(100, 10, (8, 9, 10)).astype(np.float32)
    padded = np.pad(scan, widths, constant_values=value)
    mask = measured(padded)
    expected = np.pad(np.ones(scan.shape, bool), widths)
    np.testing.assert_array_equal(expected if mask is None else mask, expected)
    assert (mask is None) == (padded.size == scan.size)


@pytest.mark.parametrize("noise", [SCAN, np.random.default_rng(1).poisson(1.2, SCAN.shape).astype(np.int16)])
def test_a_scan_without_filling_is_measured_everywhere_though_0_is_in_it(noise):
    assert measured(noise) is None
    assert measured((noise - noise.mean()).round()) is None


def test_corners_of_a_turned_scan_are_not_measured():
    whole = np.ones(SCAN.shape, np.float32)
    for fill in (0, -1024, 300):
        turned, share = (
            ndimage.rotate(one, 30, axes=(0, 1), order=0, cval=none) for one, none in ((SCAN, fill), (whole, 0))
        )
        mask = measured(np.pad(turned, 3, constant_values=fill))[3:-3, 3:-3, 3:-3]
        assert (mask | (share == 0)).all()
        assert (mask & (share == 0)).mean() < 0.03  # where a corner is thinner than three voxels


def test_a_face_that_was_taken_off_is_not_measured():
    faceless = SCAN.copy()
    faceless[:6, 8:, :10] = 0
    np.testing.assert_array_equal(measured(faceless), faceless != 0)
    inner = SCAN.copy()
    inner[4:8, 4:8, 4:8] = 0  # the least value, far from the border
    np.testing.assert_array_equal(measured(inner), inner != 0)


@pytest.mark.parametrize("fill", [0, 255, 4000, -7.5])
def test_a_face_filled_with_any_value_is_not_measured(fill):
    faceless = SCAN.copy()
    faceless[:, 8:, :6] = fill
    np.testing.assert_array_equal(measured(faceless), faceless != fill)


def test_planes_of_0_within_a_scan_and_the_few_others_of_what_fills_up_are_not_measured():
    dropped = SCAN.copy()
    dropped[:, :, 5] = dropped[:, :, 11] = 0
    np.testing.assert_array_equal(measured(dropped), dropped != 0)
    stray = np.pad(SCAN, ((0, 0), (6, 0), (0, 0)), constant_values=-3)
    stray[6:, :10, 8:] = -3
    stray[3, 16, 3] = stray[5, 18, 4] = -3
    np.testing.assert_array_equal(measured(stray), stray != -3)


def test_a_wedge_of_two_voxels_at_the_border_is_not_measured():
    turned = SCAN.copy()
    turned[:, :6, :2] = turned[:, -5:, -2:] = 255
    np.testing.assert_array_equal(measured(turned), turned != 255)


def test_a_region_of_water_in_a_ct_and_saturated_bone_are_measured():
    ct = np.random.default_rng(2).normal(-100, 30, (16, 16, 16)).round()
    ct[5:10, 5:10, 5:10] = 0
    ct[:4, :4, :4] = 3000
    assert measured(ct) is None


def test_a_round_field_of_view_within_padding_is_found_below_it():
    i, j = np.indices((24, 24)) - 11.5
    ct = np.random.default_rng(3).normal(0, 30, (24, 24, 8)).astype(np.float32)
    ct[np.hypot(i, j) > 12] = -1024
    mask = measured(np.pad(ct, 5))
    solid = np.pad(ct > -1024, 5)
    assert (mask | ~solid).all()
    assert (mask & ~solid).mean() < 0.01


@pytest.mark.parametrize("array", [np.zeros((5, 5, 5)), np.pad(np.ones((3, 3, 3)), 2), np.arange(5.0).reshape(1, 1, 5)])
def test_where_fewer_than_two_values_would_be_left_all_counts(array):
    assert measured(array) is None


def test_the_box_holds_what_any_channel_has():
    one, two = np.zeros((2, 6, 6, 6), bool)
    one[1:3, 2, 2] = two[2:5, 2, 3] = True
    assert box_around([one, two], (6, 6, 6)) == ((1, 2, 2), (5, 3, 4))
    assert box_around([one, None], (6, 6, 6)) == ((0, 0, 0), (6, 6, 6))


@given(st.integers(0, 1000), st.tuples(*[st.integers(1, 18)] * 3), st.sampled_from((0.3, 0.8, 0.97)))
def test_solid_regions_are_an_opening_and_what_is_near_it(seed, shape, density):
    mask = np.random.default_rng(seed).random(shape) < density
    cube = np.ones((3, 3, 3), bool)
    expected = ndimage.binary_erosion(mask, cube, border_value=1)
    for _ in range(1 + NEAR):
        expected = ndimage.binary_dilation(expected, cube) & mask
    np.testing.assert_array_equal(_solid(mask), expected)
