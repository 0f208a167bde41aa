from __future__ import annotations

import numpy as np
import pytest

from medseg.process.channels import covered, onto_first
from medseg.volume import Grid, Volume

GRID = Grid((20, 20, 10), np.diag([2.0, 2, 3, 1]))
TISSUE = np.random.default_rng(0).integers(20, 60, size=(1, 10, 20, 10)).astype(np.int16)


@pytest.mark.parametrize(("modality", "outside"), [("CT", -1000), ("MR", TISSUE.min()), (None, TISSUE.min())])
def test_outside_of_a_channel_is_air_in_a_ct_and_else_its_least_value(modality, outside):
    with pytest.warns(UserWarning, match="covers 50 % of the first"):
        array = onto_first(Volume(TISSUE, Grid((10, 20, 10), GRID.affine)), GRID, modality=modality)
    np.testing.assert_array_equal(array[:, :10], TISSUE)
    assert (array[:, 10:] == outside).all()


def test_air_fits_into_the_type_of_the_channel():
    with pytest.warns(UserWarning, match="covers"):
        array = onto_first(Volume(TISSUE.astype(np.uint16), Grid((10, 20, 10), GRID.affine)), GRID, modality="CT")
    assert array.min() == -1000


def test_a_filler_below_air_goes_on():
    padded = TISSUE.copy()
    padded[0, 0, 0, 0] = -3024
    with pytest.warns(UserWarning, match="covers"):
        array = onto_first(Volume(padded, Grid((10, 20, 10), GRID.affine)), GRID, modality="CT")
    assert (array[:, 10:] == -3024).all()


def test_a_channel_of_another_spacing_and_the_same_view_is_not_warned_of():
    fine = GRID.with_spacing((1, 1, 1))
    channel = Volume(np.ones((1, *fine.shape), np.float32), fine)
    assert (onto_first(channel, GRID) == 1).all()
    assert covered(GRID, fine) == 1
    half = GRID.cropped((0, 0, 0), (20, 10, 10))
    assert covered(GRID, half) == pytest.approx(0.5, abs=0.03)
    assert covered(half, GRID) == 1
