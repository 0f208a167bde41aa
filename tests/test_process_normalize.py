from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from medseg.process.normalize import CTNormalization, Rescale, ZScore, normalize


def test_ct_numbers_are_clipped_then_scaled_by_the_training_set():
    scheme = CTNormalization(lower=-100, upper=300, mean=50, std=25)
    array = np.array([-1000, -100, 50, 100, 300, 3000], np.float32).reshape(1, 6, 1, 1)
    # clip to -100 .. 300, minus 50, over 25
    assert normalize(array, [scheme])[0, :, 0, 0].tolist() == [-6, -6, 0, 2, 10, 10]


def test_a_spread_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        CTNormalization(lower=0, upper=1, mean=0, std=0)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (CTNormalization, {"mean": np.nan, "std": 1}),
        (CTNormalization, {"mean": 0, "std": np.inf}),
        (CTNormalization, {"mean": 0, "std": 1, "upper": np.inf}),
        (Rescale, {"highest": np.nan}),
    ],
)
def test_numbers_that_are_none_are_refused(kind, numbers):
    with pytest.raises(ValidationError, match="finite number"):
        kind(**numbers)


@given(st.integers(0, 1000), st.floats(0.1, 1000), st.floats(-1000, 1000))
def test_zscore_does_not_depend_on_scale_and_offset(seed, scale, offset):
    array = np.random.default_rng(seed).normal(size=(1, 5, 6, 7)).astype(np.float32)
    plain, moved = (normalize(part, [ZScore()]) for part in (array, array * np.float32(scale) + np.float32(offset)))
    assert abs(plain.mean()) < 1e-5
    assert plain.std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(plain, moved, atol=2e-2)


def test_zscore_inside_the_image_leaves_its_outside_zero():
    # Inside: 1, 3 -> mean 2, deviation 1 -> -1, 1.
    array = np.array([0, 1, 3, 0], np.float32).reshape(1, 4, 1, 1)
    assert normalize(array, [ZScore(nonzero=True)])[0, :, 0, 0].tolist() == [0, -1, 1, 0]
    mask = np.array([False, True, True, True]).reshape(4, 1, 1)
    expected = (np.array([1, 3, 0]) - 4 / 3) / np.std([1, 3, 0])
    np.testing.assert_allclose(normalize(array, [ZScore(nonzero=True)], [mask])[0, 1:, 0, 0], expected, rtol=1e-5)


def test_constant_and_empty_images_become_zero():
    constant = np.full((1, 3, 3, 3), 42, np.float32)
    assert (normalize(constant, [ZScore()]) == 0).all()
    assert (normalize(np.zeros_like(constant), [ZScore(nonzero=True)]) == 0).all()
