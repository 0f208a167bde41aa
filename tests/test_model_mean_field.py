"""The dense CRF: numbers by hand and by a plain reference, rows that stream, and the ways in which a user meets it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import make_grid
from models import threshold_model, tiny_plan
from numpy.typing import NDArray
from pydantic import ValidationError
from test_model_segmenter import ball

from medseg import CRF
from medseg.errors import UsageError
from medseg.labels import make_labels
from medseg.model import mean_field
from medseg.model.crf import Neighbors, chosen_crf
from medseg.model.mean_field import refined
from medseg.model.plan import Plan, Region
from medseg.model.soft import SoftMaps
from medseg.model.timing import Report
from medseg.volume import Grid, Volume

SHAPE, SPACING = (11, 7, 5), (1.0, 1.5, 3.0)


def on_grid(array: NDArray[np.float32], spacing_mm: tuple[float, ...] = SPACING) -> Volume:
    return Volume(array, Grid(array.shape[1:], np.diag([*spacing_mm, 1.0])))


@pytest.fixture
def noise() -> tuple[NDArray[np.float32], Volume]:
    """Return logits of three outputs and an image of two channels, both noise."""
    chance = np.random.default_rng(3)
    logits, image = (chance.normal(0, 2, (count, *SHAPE)).astype(np.float32) for count in (3, 2))
    return logits, on_grid(image / 2)


def rows_of(logits: NDArray[np.float32], axis: int, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield rows as the window does: parts of so many new ones, each with the last one before."""
    tensor = torch.from_numpy(logits)
    for start in range(0, logits.shape[axis + 1], size):
        first, stop = max(0, start - 1), min(logits.shape[axis + 1], start + size)
        yield first, tensor.narrow(axis + 1, first, stop - first)


def solved(
    logits: NDArray[np.float32], image: Volume, crf: CRF, *, axis: int = 0, size: int = 100, regions: bool = False
) -> NDArray[np.float32]:
    """Return what streams out, put together; every voxel is there, and rows that come twice are equal."""
    result = np.full_like(logits, np.nan)
    for first, part in refined(rows_of(logits, axis, size), axis, image, crf, regions=regions):
        index = [slice(None)] * 4
        index[axis + 1] = slice(first, first + part.shape[axis + 1])
        before = result[tuple(index)]
        assert np.array_equal(before[~np.isnan(before)], part.numpy()[~np.isnan(before)])
        result[tuple(index)] = part.numpy()
    assert not np.isnan(result).any()
    return result


def pairwise(image: Volume, crf: CRF) -> NDArray[np.float64]:
    """Return the pull (N, N) of each pair of voxels, from its definition, over all pairs."""
    spacing = np.asarray(image.grid.spacing_mm)
    places = np.argwhere(np.ones(image.grid.shape)) * spacing
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    values = image.array.reshape(len(image.array), -1).T.astype(float)
    unlike = ((values[:, None] - values) ** 2).sum(axis=2)
    around = [np.arange(-20, 21) * length for length in spacing]
    steps = np.linalg.norm(np.stack(np.meshgrid(*around), axis=-1), axis=-1).ravel()
    near = (distances > 0) & (distances <= crf.reach_mm)
    steps = steps[(steps > 0) & (steps <= crf.reach_mm)]

    def share(width_mm: float) -> NDArray[np.float64]:
        return np.exp(-(distances**2) / (2 * width_mm**2)) / np.exp(-(steps**2) / (2 * width_mm**2)).sum()

    appearance = share(crf.appearance_mm) * np.exp(-unlike / (2 * crf.appearance_intensity**2))
    return np.where(near, crf.appearance * appearance + crf.smoothness * share(crf.smoothness_mm), 0)


def reference(logits: NDArray[np.float32], image: Volume, crf: CRF, *, regions: bool = False) -> NDArray[np.float64]:
    """Return mean field over all pairs of voxels in float64."""
    pull, unary = pairwise(image, crf), logits.reshape(len(logits), -1).astype(float)
    state = unary
    for _ in range(crf.iterations):
        odds = np.exp(state - state.max(axis=0))
        beliefs = np.tanh(state / 2) if regions else odds / odds.sum(axis=0)
        state = unary + beliefs @ pull
    return state.reshape(logits.shape)


def shares(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    odds = np.exp(logits - logits.max(axis=0))
    return odds / odds.sum(axis=0)


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("reach_mm", [3.2, 20.0], ids=["window", "every pair"])
def test_it_is_mean_field_over_all_pairs_within_reach(noise, iterations, regions, reach_mm):
    logits, image = noise
    crf = CRF(iterations=iterations, reach_mm=reach_mm, appearance_intensity=0.7, smoothness_mm=2, appearance_mm=3)
    expected = reference(logits, image, crf, regions=regions)
    np.testing.assert_allclose(solved(logits, image, crf, regions=regions), expected, atol=1e-5)
    assert np.abs(expected - logits).max() > 0.2


def test_two_voxels_by_hand():
    # Neighbors 2 mm apart on a grid of 2 mm, each with six within 2 mm: of these one is in the image, so the weight of
    # appearance (6) is 1 for it, times exp(-0.5) as intensities are one width apart, and that of smoothness (3) is 0.5.
    crf = CRF(iterations=1, reach_mm=2.5, appearance=6, appearance_intensity=0.5, smoothness=3)
    image = on_grid(np.float32([0, 0.5]).reshape(1, 2, 1, 1), (2, 2, 2))
    logits = np.float32([[0, 0], [math.log(3), -1]]).reshape(2, 2, 1, 1)
    pull = math.exp(-0.5) + 0.5
    other = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))  # the second voxel is background by these odds
    expected = [[pull * other[0], pull * 0.25], [math.log(3) + pull * other[1], -1 + pull * 0.75]]
    np.testing.assert_allclose(solved(logits, image, crf)[:, :, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_without_weights_or_neighbors_scores_stay_as_they_are(noise, regions):
    logits, image = noise
    for crf in (CRF(appearance=0, smoothness=0), CRF(reach_mm=0.9)):
        np.testing.assert_array_equal(solved(logits, image, crf, regions=regions), logits)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_how_rows_come_changes_nothing(noise, axis, size, monkeypatch):
    logits, image = noise
    crf = CRF(iterations=3, reach_mm=3.2)
    whole = solved(logits, image, crf)
    monkeypatch.setattr(mean_field, "CHUNK_ROWS", 2)
    monkeypatch.setattr(mean_field, "BLOCK_VOXELS", {"cpu": 20})
    np.testing.assert_allclose(solved(logits, image, crf, axis=axis, size=size), whole, atol=2e-6)


def test_few_rows_are_held_however_many_there_are(monkeypatch):
    monkeypatch.setattr(mean_field, "CHUNK_ROWS", 2)
    crf, asked = CRF(iterations=3, reach_mm=2), 0
    image = on_grid(np.zeros((1, 200, 3, 3), np.float32), (1, 1, 1))

    def rows() -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal asked
        for first, logits in rows_of(np.zeros((2, 200, 3, 3), np.float32), 0, 2):
            asked = first + logits.shape[1]
            yield first, logits

    for first, part in refined(rows(), 0, image, crf):
        assert asked - (first + part.shape[1]) <= 3 * 2 + 2  # as far as three iterations reach, and a chunk
        assert part.shape[1] <= 2 + 2 * 3 + 1


def test_where_the_network_is_certain_nothing_is_computed(noise, monkeypatch):
    logits, image = noise
    crf = CRF(iterations=2)
    sure = logits * 0.2
    sure[1] += 25.0
    sure[:, :, 5:] = logits[:, :, 5:]
    expected = reference(sure, image, crf)
    monkeypatch.setattr(mean_field, "BLOCK_VOXELS", {"cpu": 1})
    found, boxes = solved(sure, image, crf), []
    np.testing.assert_allclose(shares(found), shares(expected), atol=1e-5)
    compute = mean_field._Field._pull
    monkeypatch.setattr(
        mean_field._Field, "_pull", lambda self, beliefs, box: boxes.append(box) or compute(self, beliefs, box)
    )
    solved(sure, image, crf)
    assert {box[1] for box in boxes} == {(5, 6), (6, 7)}


def test_names_of_labels_do_not_matter(noise):
    logits, image = noise
    order, crf = [2, 0, 1], CRF()
    np.testing.assert_allclose(solved(logits[order], image, crf), solved(logits, image, crf)[order], atol=2e-6)


def test_units_of_intensity_and_length_cancel(noise):
    logits, image = noise
    crf = CRF(appearance_intensity=0.4)
    brighter = image.with_array(image.array * 250 + 7)
    finer = on_grid(image.array, tuple(length / 4 for length in SPACING))
    widths = {name: getattr(crf, name) / 4 for name in ("appearance_mm", "smoothness_mm", "reach_mm")}
    whole = solved(logits, image, crf)
    np.testing.assert_allclose(
        solved(logits, brighter, crf.model_copy(update={"appearance_intensity": 100.0})), whole, atol=1e-4
    )
    np.testing.assert_allclose(solved(logits, finer, crf.model_copy(update=widths)), whole, atol=1e-5)


def test_on_a_finer_grid_neighbors_pull_as_much_and_as_far():
    crf = CRF(reach_mm=4, smoothness_mm=1.2)
    for spacing in ((1, 1, 1), (0.5, 0.5, 1), (0.8, 0.8, 3)):
        found = Neighbors.of(crf, spacing)
        assert found.strength == pytest.approx(crf.appearance + crf.smoothness)
        distances = np.linalg.norm(found.steps * np.asarray(spacing), axis=1)
        assert distances.max() <= 4
        wide = (found.smoothness * distances**2).sum() / crf.smoothness
        assert wide == pytest.approx(3 * 1.2**2, rel=0.35)  # the variance of a Gaussian in three dimensions


def test_threads_change_nothing(noise):
    logits, image = noise
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(solved(np.tile(logits, (1, 3, 3, 3)), on_grid(np.tile(image.array, (1, 3, 3, 3))), CRF()))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def test_a_reach_of_too_many_voxels_is_refused_before_the_network_runs(monkeypatch):
    model = threshold_model(50)
    monkeypatch.setattr("medseg.model.segmenter.finished_rows", None)
    with pytest.raises(UsageError, match="reach_mm 40 .* 480249 voxels .* smaller reach_mm"):
        model.segment(ball(make_grid("RAS")), crf=CRF(reach_mm=40))


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0}, {"iterations": 51}, {"appearance": -1}, {"smoothness": math.inf}, {"reach_mm": 0},
        {"smoothness_mm": math.nan}, {"appearance_intensity": 0}, {"colour": 1},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        CRF(**wrong)


def test_who_decides():
    own, other = CRF(appearance=5), CRF(appearance=7)
    assert chosen_crf(None, None) is None
    assert chosen_crf(own, None) is own
    assert chosen_crf(own, True) is own
    assert chosen_crf(None, True) == CRF()
    assert chosen_crf(own, False) is None
    assert chosen_crf(own, other) is other


def even_grid(kind: str) -> Grid:
    """Return a grid of 1 mm, turned as its kind says."""
    affine = make_grid(kind).affine.copy()
    affine[:3, :3] /= np.linalg.norm(affine[:3, :3], axis=0)
    return Grid((24, 22, 20), affine)


def speckled(grid: Grid) -> Volume:
    """Return a ball in which single voxels are dark, and around which single ones are bright."""
    image = ball(grid)
    array = image.array.copy()
    array[0, 4::4, 4::4, 4::4] = 75 - array[0, 4::4, 4::4, 4::4] / 2
    return image.with_array(array)


SMOOTH = CRF(appearance=0, smoothness=100, smoothness_mm=1, reach_mm=2)


@pytest.mark.parametrize("kind", ["RAS", "PIR", "oblique"])
@pytest.mark.parametrize("activation", [None, "softmax"])
def test_specks_go_on_any_grid(kind, activation):
    grid = even_grid(kind)
    model = threshold_model(50, activation=activation)
    truth, plain, report = model.segment(ball(grid)), model.segment(speckled(grid)), Report()
    found = model.segment(speckled(grid), crf=SMOOTH, report=report)
    wrong = [(one.array != truth.array)[0, 4::4, 4::4, 4::4] for one in (plain, found)]
    clear = (np.abs(ball(grid).array - 50) > 40)[0, 4::4, 4::4, 4::4]
    assert wrong[0][clear].all()
    assert not wrong[1][clear].any()
    assert report.facts["crf"] == SMOOTH.model_dump()
    assert "crf" in report.seconds
    soft = SoftMaps(probabilities=True)
    model.segment(speckled(grid), crf=SMOOTH, soft=soft)
    np.testing.assert_array_equal(soft.probabilities.array.argmax(axis=0), found.array[0])


def test_a_plan_with_a_crf_uses_it_and_one_without_is_as_it_was(tmp_path):
    image = speckled(even_grid("RAS"))
    with_crf, without = threshold_model(50, crf=SMOOTH), threshold_model(50)
    with_crf.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").crf == SMOOTH
    assert Plan.model_validate(tiny_plan().model_dump(exclude={"crf"})).crf is None
    plain, smooth = without.segment(image).array, without.segment(image, crf=SMOOTH).array
    assert (plain != smooth).any()
    np.testing.assert_array_equal(with_crf.segment(image).array, smooth)
    np.testing.assert_array_equal(with_crf.segment(image, crf=True).array, smooth)
    np.testing.assert_array_equal(with_crf.segment(image, crf=False).array, plain)


def test_each_region_is_smoothed_for_itself():
    regions = (Region(name="whole", members=(1, 2), value=1), Region(name="core", members=(2,), value=2))
    table = make_labels([(1, "whole"), (2, "core")])
    model = threshold_model(50, labels=table, regions=regions)  # the first region is what is dark, the second is bright
    image = speckled(even_grid("RAS"))
    plain, found = model.segment(image).array[0], model.segment(image, crf=SMOOTH).array[0]
    assert set(np.unique(found)) == {1, 2}
    specks = np.zeros(found.shape, bool)
    specks[4::4, 4::4, 4::4] = True
    inside = ball(image.grid).array[0] > 90
    assert (plain[specks & inside] == 1).all()
    assert (found[specks & inside] == 2).all()
