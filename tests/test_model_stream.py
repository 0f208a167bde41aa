from __future__ import annotations

import resource
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import make_grid, rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_export import ALWAYS, NEVER, ROUNDING, interpolated, kinds, make_logits, painted, seeds

from medseg.errors import OutputError
from medseg.model import export, stream
from medseg.model.contenders import Cells
from medseg.model.soft import SoftMaps
from medseg.model.stream import pieces
from medseg.volume import Grid


def rows_of(logits: torch.Tensor, axis: int, cuts: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the logits cut at some rows along an axis, as the window finishes them; what was yielded is overwritten."""
    ends = [*sorted(set(cuts)), logits.shape[axis + 1]]
    start = 0
    for end in ends:
        part = logits.narrow(axis + 1, start, end - start).clone()
        yield start, part
        part.fill_(torch.nan)
        start = end - 1


def cut(rng: np.random.Generator, size: int) -> list[int]:
    return rng.integers(1, size, size=rng.integers(0, 3)).tolist() if size > 1 else []


def winners_onto(logits: torch.Tensor, grid: Grid, target: Grid, axis: int = 0, cuts: tuple[int, ...] = (), **regions):
    result = np.full(target.shape, -1)
    for piece in pieces(rows_of(logits, axis, list(cuts)), axis, grid, target, **regions):
        assert (result[piece.index] == -1).all()
        result[piece.index] = piece.winners
    return result


def target_grid(grid: Grid, kind: str, rng: np.random.Generator) -> Grid:
    fine = grid.with_spacing(np.array(grid.spacing_mm) * rng.uniform(0.4, 2.5, size=3))
    if len(kind) == 3:
        return fine.reoriented(kind)
    if kind == "one slice":
        return fine.cropped((0, 0, 0), (*fine.shape[:2], 1))
    affine = fine.affine.copy()
    if kind == "turned":
        affine[:3, :3] = rotation((20, 10, -15)) @ affine[:3, :3]
    else:
        affine[:3, 2] += 0.4 * affine[:3, 1]
    return Grid(fine.shape, affine)


def test_voxels_on_voxels_are_not_interpolated(monkeypatch):
    monkeypatch.setattr(Cells, "decide", None)
    logits = make_logits("noise", 5, (4, 5, 6), np.random.default_rng(1))
    grid = make_grid("LPS", (4, 5, 6))
    np.testing.assert_array_equal(winners_onto(logits, grid, grid, 1, (2, 4)), logits.numpy().argmax(axis=0))
    flipped = winners_onto(logits, grid, grid.reoriented("RAS"), 0, (1, 3))
    np.testing.assert_array_equal(flipped, logits.numpy().argmax(axis=0)[::-1, ::-1])


@settings(max_examples=100)
@given(
    seed=seeds,
    source=st.sampled_from(["RAS", "LPS", "PIR", "oblique"]),
    target=st.sampled_from(["LAS", "SPL", "PIR", "turned", "sheared", "one slice"]),
    kind=kinds,
    axis=st.integers(0, 2),
)
def test_between_any_two_grids_however_the_rows_come(seed, source, target, kind, axis):
    rng = np.random.default_rng(seed)
    grid = make_grid(source, (5, 6, 1 if rng.random() < 0.2 else 4))
    logits = make_logits(kind, 6, grid.shape, rng)
    onto = target_grid(grid, target, rng)
    expected = interpolated(logits, grid.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1))))
    rounding = ROUNDING * np.abs(logits.numpy()).max()
    cuts = tuple(cut(rng, grid.shape[axis]))
    winner = winners_onto(logits, grid, onto, axis, cuts)
    lost = expected.max(axis=0) - np.take_along_axis(expected, winner[None], axis=0)[0]
    assert lost.max() <= rounding
    sure = (np.abs(expected) > rounding).all(axis=0)
    order = [4, 2, 9, 1, 300, 7]
    labels = np.array([0, *order])[winners_onto(logits, grid, onto, axis, cuts, regions=True)]
    np.testing.assert_array_equal(labels[sure], painted(expected, order)[sure])


def test_far_from_the_first_voxel_positions_are_as_exact_as_near():
    # Class 1 wins from row 4998.3 on; the target's rows lie 1e-3 apart, and one of them 1e-5 beyond that border.
    grid = Grid((5000, 3, 3), np.eye(4))
    logits = torch.zeros((2, *grid.shape))
    logits[1] = (torch.arange(5000).double() - 4998.3)[:, None, None]
    affine = np.eye(4)
    affine[:3] = [[1e-3, 0, 0, 4998.3 - 0.25 + 1e-5], [0, 1, 0.4, 0], [0, 0, 1, 0]]
    winner = winners_onto(logits, grid, Grid((500, 3, 3), affine))
    np.testing.assert_array_equal(winner, np.broadcast_to((np.arange(500) >= 250)[:, None, None], (500, 3, 3)))


@pytest.mark.parametrize("cost", [NEVER, ALWAYS])
@pytest.mark.parametrize("target", ["SPL", "turned"])
def test_blocks_meet_without_seams(monkeypatch, target, cost):
    rng = np.random.default_rng(3)
    grid = make_grid("RAS", (9, 8, 7))
    logits = make_logits("noise", 300, grid.shape, rng)
    onto = target_grid(grid, target, rng)
    whole = winners_onto(logits, grid, onto)
    monkeypatch.setattr(export, "PRUNING_COST", cost)
    monkeypatch.setattr(export, "BLOCK_VOXELS", 2 * onto.shape[1] * onto.shape[2] + 5)
    monkeypatch.setattr(export, "PIECE_CLASSES", 999)
    monkeypatch.setattr(export, "BLOCK_SCORES", 999)
    monkeypatch.setattr(stream, "SCATTERED_VOXELS", 200)
    monkeypatch.setattr("medseg.model.contenders.CACHED_SCORES", 60)
    np.testing.assert_array_equal(winners_onto(logits, grid, onto, 1, (3, 5)), whole)
    assert whole.max() > 255


def soft_maps(logits: torch.Tensor, grid: Grid, target: Grid, folder=None, *, regions: bool = False) -> SoftMaps:
    soft = SoftMaps(probabilities=True, uncertainty=True, folder=folder)
    soft.begin(target, len(logits), (slice(None),) * 3, regions=regions)
    for piece in pieces(rows_of(logits, 2, [2]), 2, grid, target, regions=regions):
        soft.take(piece)
    return soft


@pytest.mark.parametrize("target", ["SPL", "turned", "one slice"])
@pytest.mark.parametrize("in_file", [True, False])
def test_probabilities_and_their_entropy_are_those_of_interpolated_logits(monkeypatch, tmp_path, target, in_file):
    monkeypatch.setattr(stream, "CHUNK_SCORES", 300)
    rng = np.random.default_rng(6)
    grid = make_grid("PIR", (5, 6, 4))
    logits = make_logits("noise", 3, grid.shape, rng)
    onto = target_grid(grid, target, rng)
    scores = interpolated(logits, grid.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1))))
    expected = np.exp(scores) / np.exp(scores).sum(axis=0)
    soft = soft_maps(logits, grid, onto, tmp_path if in_file else None)
    np.testing.assert_allclose(soft.probabilities.array, expected, atol=1e-6)
    entropy = -(expected * np.log(expected)).sum(axis=0) / np.log(3)
    np.testing.assert_allclose(soft.uncertainty.array[0], entropy, atol=1e-6)
    np.testing.assert_allclose(soft.volumes_ml, expected.sum(axis=(1, 2, 3)) * onto.voxel_mm3 / 1000, rtol=1e-5)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_place_is_said_so(tmp_path):
    soft = SoftMaps(uncertainty=True, folder=tmp_path / "nowhere")
    with pytest.raises(OutputError, match="no place for probabilities"):
        soft.begin(make_grid("RAS", (2, 2, 2)), 2, (slice(None),) * 3, regions=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(OutputError, match="no place for probabilities"):
            SoftMaps(uncertainty=True, folder=tmp_path).begin(
                make_grid("RAS", (20, 20, 20)), 2, (slice(None),) * 3, regions=False
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def test_regions_have_sigmoids_and_the_entropy_of_the_least_certain():
    logits = torch.tensor([[0.0, 50], [-50, 1]]).view(2, 2, 1, 1)
    grid = make_grid("RAS", (2, 1, 1))
    soft = soft_maps(logits.transpose(1, 3), grid.reoriented("SAR"), grid.reoriented("SAR"), regions=True)
    share = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(soft.probabilities.array.ravel(), [0.5, 1, 0, share], atol=1e-6)
    certain = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    np.testing.assert_allclose(soft.uncertainty.array.ravel(), [1, certain], atol=1e-6)


def test_outside_the_box_all_is_background_and_certain():
    grid = make_grid("RAS", (4, 3, 2))
    soft = SoftMaps(probabilities=True, uncertainty=True)
    box = (slice(1, 3), slice(0, 3), slice(0, 2))
    soft.begin(grid, 2, box, regions=False)
    part = grid.cropped((1, 0, 0), (3, 3, 2))
    for piece in pieces(rows_of(torch.zeros(2, *part.shape), 0, []), 0, part, part):
        soft.take(piece)
    np.testing.assert_allclose(soft.probabilities.array[1, :, 0, 0], [0, 0.5, 0.5, 0])
    np.testing.assert_allclose(soft.probabilities.array.sum(axis=0), 1)
    np.testing.assert_allclose(soft.uncertainty.array[0, :, 0, 0], [0, 1, 1, 0])
    np.testing.assert_allclose(np.array(soft.volumes_ml) / (grid.voxel_mm3 / 1000), [18, 6])
