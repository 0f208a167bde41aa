from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.train import augment
from medseg.train.augment import CHANGES, blur, change_intensities, coarser, contrast, gamma, inverted_gamma


@pytest.fixture
def image():
    rough = np.random.default_rng(3).normal(size=(20, 24, 18))
    return torch.from_numpy(ndimage.gaussian_filter(rough, 2) * 10).float()


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("change", [change for change, *_ in CHANGES], ids=lambda change: change.__name__)
def test_each_change_changes_keeps_shape_and_input_and_is_a_function_of_its_seed(change, image):
    before = image.clone()
    once, again, other = (change(image, seeded(seed)) for seed in (5, 5, 6))
    assert once.shape == image.shape
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert not torch.equal(once, image)
    assert torch.equal(image, before)


def test_blur_is_scipys_gaussian_of_the_deviations_that_were_drawn(image, monkeypatch):
    sigmas = iter((0.5, 0.8, 1.0))
    monkeypatch.setattr(augment, "_uniform", lambda *_: next(sigmas))
    expected = ndimage.gaussian_filter(image.numpy().astype(np.float64), (0.5, 0.8, 1.0), mode="nearest", radius=3)
    np.testing.assert_allclose(blur(image, seeded()).numpy(), expected, atol=1e-5)


def test_a_coarser_scan_of_half_the_voxels_is_between_the_voxels_that_are_left(image, monkeypatch):
    monkeypatch.setattr(augment, "_uniform", lambda *_: 0.5)
    ramp = torch.arange(20.0)[:, None, None].expand(20, 24, 18)
    seen = coarser(ramp, seeded())
    # Every second voxel is kept (the odd ones: their centers lie nearest), at positions 0.5, 2.5 ... of the fine grid.
    np.testing.assert_allclose(seen[1:19, 0, 0], np.clip(np.arange(1, 19) + 0.5, 1, 19), atol=1e-5)


@pytest.mark.parametrize("bend", [gamma, inverted_gamma])
def test_gamma_keeps_mean_and_spread_and_order(bend, image):
    bent = bend(image, seeded())
    assert float(bent.mean()) == pytest.approx(float(image.mean()), abs=1e-4)
    assert float(bent.std()) == pytest.approx(float(image.std()), rel=1e-4)
    order = image.flatten().argsort()
    assert (bent.flatten()[order].diff() >= -1e-5).all()


def test_inverted_gamma_bends_the_other_end(image, monkeypatch):
    monkeypatch.setattr(augment, "_factor", lambda *_: 1.5)
    up, down = gamma(image, seeded()), inverted_gamma(-image, seeded())
    torch.testing.assert_close(up, -down)


def test_contrast_stays_within_the_old_range(image, monkeypatch):
    monkeypatch.setattr(augment, "_factor", lambda *_: 1.25)
    spread = contrast(image, seeded())
    assert spread.min() == image.min()
    assert spread.max() == image.max()
    assert spread.std() > image.std()


def test_constant_images_stay_numbers():
    for change, *_ in CHANGES:
        assert change(torch.full((8, 8, 8), 3.0), seeded()).isfinite().all()


def test_channels_are_changed_by_numbers_of_their_own_and_images_by_their_own_seed():
    one = torch.randn(1, 1, 12, 12, 12, generator=seeded())
    images = one.expand(40, 2, -1, -1, -1).clone()
    changed = change_intensities(images.clone(), torch.arange(40))
    touched = [not torch.equal(a, b) for a, b in zip(changed, images, strict=True)]
    # 1 - 0.9 * 0.8 * 0.85 * 0.85 * 0.75 * 0.9 * 0.7, less where blur and coarser pass over both channels: about 0.73.
    assert 20 <= sum(touched) <= 38
    assert any(not torch.equal(image[0], image[1]) for image in changed)
    torch.testing.assert_close(change_intensities(images[7:8].clone(), torch.tensor([7])), changed[7:8])
