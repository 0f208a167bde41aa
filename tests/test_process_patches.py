from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import UsageError
from medseg.process.patches import blend_weights, padding_to, tile_starts, tiles


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
    assert [place[0].start for place in tiles((6, 4, 4), (4, 4, 4), 1.0)] == [0, 2]


@given(st.tuples(*[st.integers(1, 40)] * 3))
def test_blend_weights_are_highest_in_the_middle_symmetric_and_never_zero(patch):
    weights = blend_weights(patch)
    assert weights.dtype == np.float32
    assert weights.min() > 0
    assert weights.max() == 1
    np.testing.assert_allclose(weights, weights[::-1, ::-1, ::-1], rtol=1e-5)
    assert weights[tuple(edge // 2 for edge in patch)] == pytest.approx(1)


def test_padding_puts_the_image_in_the_middle():
    assert padding_to((5, 8, 10), (8, 8, 7)) == ((1, 2), (0, 0), (0, 0))
