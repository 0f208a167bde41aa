from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.model import export
from medseg.model.contenders import Cells, numbered
from medseg.model.export import interpolate_slab, winners_slab
from medseg.process.resample import AxisPositions

ROUNDING = 2e-6
"""What float32 may lose, as a share of the range of scores."""

NEVER, ALWAYS = 1e9, 0
"""Values of PRUNING_COST by which classes are never or always pruned."""

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 5)] * 3)
costs = st.sampled_from([NEVER, ALWAYS])
kinds = st.sampled_from(["noise", "border", "near ties", "offset"])


def axes_at(*positions: np.ndarray) -> list[AxisPositions]:
    return [AxisPositions(axis, np.asarray(p, np.float64), 1.0) for axis, p in enumerate(positions)]


def interpolated(logits: torch.Tensor, index: np.ndarray) -> np.ndarray:
    """Return every class (C, ...) in float64 at indices (..., 3), by the formula itself."""
    scores = logits.numpy().astype(np.float64)
    size = np.array(scores.shape[1:])
    index = np.clip(index, 0, size - 1)
    result = np.zeros((len(scores), *index.shape[:-1]))
    for corner in np.ndindex(2, 2, 2):
        voxel = np.floor(index) + corner
        weight = np.prod(1 - np.abs(index - voxel), axis=-1)
        i, j, k = np.moveaxis(np.minimum(voxel, size - 1).astype(int), -1, 0)
        result += weight * scores[:, i, j, k]
    return result


def reference(logits: torch.Tensor, axes: list[AxisPositions]) -> np.ndarray:
    return interpolated(logits, np.stack(np.meshgrid(*(axis.positions for axis in axes), indexing="ij"), axis=-1))


def painted(scores: np.ndarray, order: list[int]) -> np.ndarray:
    result = np.zeros(scores.shape[1:], int)
    for score, label in zip(scores, order, strict=True):
        result[score > 0] = label
    return result


def regions_slab(logits: torch.Tensor, axes: list[AxisPositions], order: list[int]) -> np.ndarray:
    return np.array([0, *order])[winners_slab(logits, axes, regions=True)]


def make_logits(kind: str, classes: int, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Return white noise, or classes that cross in a plane with others just below or above the crossing."""
    noise = rng.normal(size=(classes, *shape))
    place = sum(rng.normal() * axis for axis in np.indices(shape))
    plane = (place - rng.choice(place.ravel()) - rng.uniform(0, 1)) * rng.choice([-1, 1], size=(classes, 1, 1, 1))
    height = rng.normal(size=(classes, 1, 1, 1)) * rng.choice([0.01, 0.5])
    flat = rng.uniform(size=(classes, 1, 1, 1)) < 0.4
    logits = {
        "noise": noise,
        "border": np.where(flat, height, 3 * plane + height) + 0.02 * noise,
        "near ties": np.round(noise) + 1e-5 * rng.normal(size=noise.shape),
        "offset": 1000 + noise,
    }[kind]
    return torch.from_numpy(logits.astype(np.float32))


def random_positions(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return positions of an axis up or down, finer or coarser than the voxels, on them or not, partly outside."""
    count = rng.integers(1, 9)
    step = rng.choice([1, 0.5, rng.uniform(0.1, 3)]) * rng.choice([-1, 1])
    return rng.choice([0, rng.uniform(-1, size)]) + step * (np.arange(count) - rng.integers(0, count))


def in_any_layout(logits: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return equal logits whose axes lie in memory in another order, or that are a part of something larger."""
    order = rng.permutation(4).tolist()
    larger = torch.full([n + rng.integers(0, 2) for n in logits.permute(order).shape], torch.nan)
    part = larger[tuple(slice(larger.shape[axis] - logits.shape[order[axis]], None) for axis in range(4))]
    part.copy_(logits.permute(order))
    return part.permute(np.argsort(order).tolist())


@settings(max_examples=150)
@given(seed=seeds, shape=shapes, classes=st.integers(1, 6), cost=costs)
def test_whole_numbers_are_exact_and_ties_go_to_the_lower_class(seed, shape, classes, cost):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(-3, 4, size=(classes, *shape)).astype(np.float32))
    # Eighths and small whole numbers: no rounding anywhere.
    axes = axes_at(*(rng.integers(-12, 8 * size + 8, size=rng.integers(1, 8)) / 8 for size in shape))
    order = rng.permutation(np.arange(1, classes + 1)).tolist()
    expected = reference(logits, axes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "PRUNING_COST", cost)
        scores = in_any_layout(logits, rng)
        np.testing.assert_array_equal(winners_slab(scores, axes), expected.argmax(axis=0))
        np.testing.assert_array_equal(regions_slab(scores, axes, order), painted(expected, order))


@settings(max_examples=200)
@given(seed=seeds, shape=shapes, classes=st.integers(2, 12), kind=kinds, cost=costs)
def test_the_winner_is_the_largest_but_for_rounding(seed, shape, classes, kind, cost):
    rng = np.random.default_rng(seed)
    logits = make_logits(kind, classes, shape, rng)
    axes = axes_at(*(random_positions(rng, size) for size in shape))
    expected = reference(logits, axes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "PRUNING_COST", cost)
        winner = winners_slab(in_any_layout(logits, rng), axes)
    assert winner.dtype == np.uint16
    lost = expected.max(axis=0) - np.take_along_axis(expected, winner[None].astype(int), axis=0)[0]
    assert lost.max() <= ROUNDING * np.abs(logits.numpy()).max()


@settings(max_examples=100)
@given(seed=seeds, shape=shapes, classes=st.integers(1, 6), kind=kinds)
def test_regions_are_painted_one_over_another(seed, shape, classes, kind):
    rng = np.random.default_rng(seed)
    logits = make_logits(kind, classes, shape, rng)
    axes = axes_at(*(random_positions(rng, size) for size in shape))
    order = rng.permutation(np.arange(1, classes + 1)).tolist()
    expected = reference(logits, axes)
    sure = (np.abs(expected) > ROUNDING * np.abs(logits.numpy()).max()).all(axis=0)
    np.testing.assert_array_equal(regions_slab(logits, axes, order)[sure], painted(expected, order)[sure])


@pytest.mark.parametrize("cost", [NEVER, ALWAYS])
def test_a_class_that_wins_at_no_corner_can_win_between_them(monkeypatch, cost):
    monkeypatch.setattr(export, "PRUNING_COST", cost)
    logits = torch.tensor([[10.0, -10], [-10, 10], [5, 5]]).view(3, 2, 1, 1)
    # Class 0 is 10 - 20 x and meets 5 at a quarter; class 1 does so at three quarters.
    winner = winners_slab(logits, axes_at([0, 0.2, 0.25, 0.3, 0.5, 0.7, 0.75, 0.8, 1], [0], [0]))
    assert winner.ravel().tolist() == [0, 0, 0, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("cost", [NEVER, ALWAYS])
def test_a_class_that_never_exceeds_the_others_wins_a_tie_if_it_is_lower(monkeypatch, cost):
    monkeypatch.setattr(export, "PRUNING_COST", cost)
    logits = torch.tensor([[5.0, 5], [10, 0], [0, 10]]).view(3, 2, 1, 1)
    assert winners_slab(logits, axes_at([0.25, 0.5, 0.75], [0], [0])).ravel().tolist() == [1, 0, 2]
    assert winners_slab(logits.flip(0), axes_at([0.25, 0.5, 0.75], [0], [0])).ravel().tolist() == [1, 0, 0]


@settings(max_examples=100)
@given(seed=seeds, classes=st.integers(2, 8), kind=kinds)
def test_what_reaches_the_mean_of_the_corner_winners_is_kept_and_no_more(seed, classes, kind):
    rng = np.random.default_rng(seed)
    logits = make_logits(kind, classes, (2, 2, 2), rng)
    scores = logits.numpy().astype(np.float64)
    mean = scores[np.unique(scores.argmax(axis=0))].mean(axis=0)
    # One more class reaches the mean at a single corner, as closely as float32 can.
    scores = np.append(scores, np.full((1, 2, 2, 2), scores.min() - 9), axis=0)
    just = np.float32(mean[1, 0, 1])
    scores[-1, 1, 0, 1] = just if just >= mean[1, 0, 1] else np.nextafter(just, np.float32(np.inf))
    cells = Cells.of(torch.from_numpy(scores.astype(np.float32)), (True, True, True), regions=False)
    reaching = [(scores >= mean - slack).any(axis=(1, 2, 3)).sum() for slack in (0, 1e-5 * np.ptp(scores))]
    assert reaching[0] <= cells.kept(torch.tensor([0])) <= reaching[1]


def test_classes_that_cannot_win_are_not_interpolated():
    scores = torch.full((40, 6, 6, 6), -5.0)
    scores[3] = torch.linspace(-2.5, 2.5, 6)[:, None, None]
    scores[7] = -scores[3]
    scores[30] = -1  # below the mean of 3 and 7, which is 0, but above one of them
    cells = Cells.of(scores, (True, True, True), regions=False)
    assert cells.kept(torch.tensor([2 * 36])) == 2
    below_zero = Cells.of(scores, (True, True, True), regions=True)
    assert below_zero.kept(torch.tensor([2 * 36])) == 2


def test_beyond_the_outer_voxels_their_scores_go_on():
    logits = make_logits("noise", 5, (4, 3, 2), np.random.default_rng(2))
    winner = winners_slab(logits, axes_at([-7, -0.5, 3.4, 90], [1], [0]))
    corners = logits.numpy().argmax(axis=0)[[0, 0, 3, 3], 1, 0]
    np.testing.assert_array_equal(winner.ravel(), corners)


def test_scores_of_every_class_at_the_voxels_of_the_target():
    rng = np.random.default_rng(4)
    logits = make_logits("noise", 3, (6, 1, 5), rng)
    axes = axes_at(np.linspace(7, -2, 8), [0, 0.4], [0.5, 1.25, 2])
    np.testing.assert_allclose(interpolate_slab(logits, axes).numpy(), reference(logits, axes), atol=1e-6)


@given(values=st.lists(st.integers(5, 60), min_size=1))
def test_values_are_numbered_in_order(values):
    distinct, number = numbered(torch.tensor(values))
    expected, inverse = np.unique(values, return_inverse=True)
    assert distinct.tolist() == expected.tolist()
    assert number.tolist() == inverse.tolist()
