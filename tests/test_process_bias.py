from __future__ import annotations

import numpy as np
import pytest

from medseg.errors import InputError
from medseg.labels import make_labels
from medseg.model.plan import Channel, Plan
from medseg.model.preprocess import prepare
from medseg.networks.kinds import Network
from medseg.process.bias import correct_bias
from medseg.process.normalize import ZScore
from medseg.volume import Grid, Volume

GRID = Grid((40, 40, 24), np.diag([1.0, 1.0, 1.5, 1.0]))


def phantom(*, biased: bool) -> Volume:
    """Two tissues in a ball; a coil brightens one side by a factor of up to three."""
    i, j, k = np.indices(GRID.shape)
    inside = (i - 19.5) ** 2 + (j - 19.5) ** 2 + 2.25 * (k - 11.5) ** 2 < 17**2
    image = np.where(inside, np.where((i // 8 + j // 8) % 2, 300.0, 400.0), 5.0)
    image += np.random.default_rng(1).normal(0, 3, GRID.shape)
    field = np.exp(0.55 * (i - 19.5) / 19.5) if biased else 1.0
    return Volume((image * field).astype(np.float32)[None], GRID)


def variation(volume: Volume) -> float:
    """Return the standard deviation of one tissue as a share of its mean."""
    i, j, k = np.indices(GRID.shape)
    inside = (i - 19.5) ** 2 + (j - 19.5) ** 2 + 2.25 * (k - 11.5) ** 2 < 15**2
    tissue = volume.array[0][inside & ((i // 8 + j // 8) % 2 == 0)]
    return float(tissue.std() / tissue.mean())


def test_a_coils_field_is_taken_out_the_same_way_every_time():
    before = phantom(biased=True)
    after = correct_bias(before, (True,))
    assert variation(before) > 0.19
    assert variation(after) < 0.08
    np.testing.assert_array_equal(after.array, correct_bias(before, (True,)).array)


def test_only_channels_that_ask_for_it_change():
    image = phantom(biased=True)
    two = image.with_array(np.concatenate([image.array, np.zeros_like(image.array)]))
    assert correct_bias(image, (False,)) is image
    corrected = correct_bias(two, (True, True))
    assert not corrected.array[1].any()  # constant: there is no field to see
    np.testing.assert_array_equal(correct_bias(two, (False, True)).array[0], image.array[0])


def test_one_slice_is_too_thin():
    image = Volume(
        np.random.default_rng(0).uniform(1, 9, (1, 20, 20, 1)).astype(np.float32), Grid((20, 20, 1), np.eye(4))
    )
    with pytest.raises(InputError, match="at least two voxels along each axis; the image has 20 x 20 x 1") as caught:
        correct_bias(image, (True,))
    assert caught.value.reason == "too_thin"
    assert correct_bias(image, (False,)) is image


@pytest.mark.parametrize("lift", [0.0, -1000.0])
def test_a_plan_asks_for_it_and_both_training_and_segmentation_go_through_it(lift):
    channel = Channel(name="T1", normalization=ZScore(), bias_correction="n4")
    network = Network(features=(4, 4), kernels=((3, 3, 3),) * 2, strides=((1, 1, 1), (2, 2, 2)), heads=0)
    plan = Plan(
        name="x", channels=(channel,), labels=make_labels([(1, "a")]), spacing_mm=(1, 1, 1.5), patch=(8, 8, 8),
        network=network,
    )  # fmt: skip
    image = phantom(biased=True)
    image = image.with_array(image.array + np.float32(lift))  # numbers below 0 have no logarithm
    plain = prepare(image, plan.model_copy(update={"channels": (Channel(name="T1", normalization=ZScore()),)}))
    assert np.isfinite(prepare(image, plan).array).all()
    assert not np.allclose(prepare(image, plan).array, plain.array, atol=0.05)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
