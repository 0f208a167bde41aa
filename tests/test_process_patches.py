from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import UsageError
from medseg.process.patches import normalized_weights, padding_to, tile_starts


@given(size=st.integers(1, 300), patch=st.integers(1, 128), step=st.floats(0.05, 1.0))
def test_tiles_cover_every_voxel_and_are_as_few_as_the_step_allows(size, patch, step):
    if size < patch:
        with pytest.raises(UsageError, match="do not fit"):
            tile_starts(size, patch, step)
        return
    starts = tile_starts(size, patch, step)
    covered = np.zeros(size, bool)
    for start in starts:
        assert 0 <= start <= size - patch
        covered[start : start + patch] = True
    assert covered.all()
    assert starts == sorted(set(starts))
    widest = max(1.0, patch * step)
    assert np.diff([0, *starts]).max() <= widest + 1  # rounded to whole voxels
    assert (len(starts) - 2) * widest < size - patch or len(starts) == 1  # one tile fewer would not do


def test_a_step_outside_its_range_is_refused():
    with pytest.raises(UsageError, match="above 0 and at most 1; here it is 0"):
        tile_starts(10, 5, 0)
    with pytest.raises(UsageError, match="here it is 1.5"):
        tile_starts(10, 5, 1.5)


def test_tiles_by_hand():
    # size 10, patch 4, step 0.5: 6 voxels of travel in steps of at most 2 -> 4 tiles at 0, 2, 4, 6.
    assert tile_starts(10, 4, 0.5) == [0, 2, 4, 6]


@given(size=st.integers(1, 200), patch=st.integers(1, 64), step=st.floats(0.1, 1.0))
def test_shares_of_all_tiles_add_up_to_one_and_are_highest_in_the_middle(size, patch, step):
    size = max(size, patch)
    starts = tile_starts(size, patch, step)
    shares = normalized_weights(size, patch, starts)
    total = np.zeros(size)
    for start, share in zip(starts, shares, strict=True):
        assert share.dtype == np.float32
        assert (share > 0).all()
        total[start : start + patch] += share
    np.testing.assert_allclose(total, 1, atol=1e-5)
    if len(starts) > 1 and starts[1] < patch:  # where two tiles meet, the one whose middle is nearer counts more
        assert shares[0][starts[1]] >= shares[1][0]


def test_padding_puts_the_image_in_the_middle():
    assert padding_to((5, 8, 10), (8, 8, 7)) == ((1, 2), (0, 0), (0, 0))
