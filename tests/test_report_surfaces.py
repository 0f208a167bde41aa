from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_grid
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

from medseg.report.surfaces import compare_surfaces
from medseg.volume import Grid

CUBE = np.zeros((12, 12, 12), bool)
CUBE[3:7, 3:7, 3:7] = True


def test_a_shifted_cube_by_hand():
    # One voxel of 2 mm to the right: two faces of 16 voxels lie 2 mm apart, the rims of the others are common.
    grid = Grid(CUBE.shape, np.diag([2.0, 1.0, 1.0, 1.0]))
    score = compare_surfaces(np.roll(CUBE, 1, axis=0), CUBE, grid, tolerance_mm=1.9)
    # Each surface has 56 voxels. 12 of the outer face are 2 mm from the other's; its 4 inner ones are covered at 1 mm.
    assert score.hd95_mm == pytest.approx(2)
    assert 0 < score.mean_mm < 1
    assert compare_surfaces(np.roll(CUBE, 1, axis=0), CUBE, grid, tolerance_mm=2.0).dice == 1
    assert score.dice == pytest.approx(1 - 2 * 16 / 112)


def test_nothing_is_at_no_distance():
    grid = make_grid("oblique", CUBE.shape)
    same = compare_surfaces(CUBE, CUBE, grid, 1.0)
    assert (same.dice, same.hd95_mm, same.mean_mm) == (1, 0, 0)
    missed = compare_surfaces(~CUBE & CUBE, CUBE, grid, 1.0)
    worst = pytest.approx(np.linalg.norm((np.array(grid.shape) - 1) * grid.spacing_mm))  # corner to corner
    assert (missed.dice, missed.hd95_mm, missed.mean_mm) == (0, worst, worst)
    assert math.isnan(compare_surfaces(~CUBE & CUBE, ~CUBE & CUBE, grid, 1.0).dice)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spacing=st.tuples(*[st.floats(0.5, 3)] * 3))
def test_monai_agrees(seed, spacing):
    # A distance equal to the tolerance up to rounding counts in single precision (MONAI) or in double, not in both.
    distances = np.linalg.norm(np.moveaxis(np.indices((3, 3, 3)), 0, -1) * spacing, axis=-1)
    assume(np.abs(distances - 1.0).min() > 1e-5)
    rng = np.random.default_rng(seed)
    one, other = rng.random((2, 6, 7, 5)) < 0.3
    one[2, 2, 2] = other[3, 3, 3] = True
    ours = compare_surfaces(one, other, Grid(one.shape, np.diag([*spacing, 1.0])), tolerance_mm=1.0)
    a, b = (torch.from_numpy(np.stack([~mask, mask])[None]).float() for mask in (one, other))
    hd95 = compute_hausdorff_distance(a, b, percentile=95, spacing=list(spacing))
    assert ours.hd95_mm == pytest.approx(float(hd95), abs=1e-4)
    mean = compute_average_surface_distance(a, b, symmetric=True, spacing=list(spacing))
    assert ours.mean_mm == pytest.approx(float(mean), abs=1e-4)
    dice = compute_surface_dice(a, b, class_thresholds=[1.0], spacing=list(spacing))
    assert ours.dice == pytest.approx(float(dice), abs=1e-6)


def test_a_sheared_grid_counts_millimeters_and_not_voxels():
    affine = np.eye(4)
    affine[1, 2] = 1  # each slice lies 1 mm further to the front
    low, high = np.zeros((2, 1, 5, 2), bool)
    low[0, 2, 0] = high[0, 1, 1] = True  # index (0, -1, 1) apart, but straight above in the world
    assert compare_surfaces(low, high, Grid(low.shape, affine), 1.0).hd95_mm == pytest.approx(1)
