"""Rigid registration finds a known place again, says how sure it is, and refuses what has nothing in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_grid, rotation
from scipy.ndimage import gaussian_filter

import medseg
from medseg.errors import GeometryError
from medseg.process.register import register_rigid
from medseg.volume import Grid, Volume


def phantom(grid: Grid, seed: int = 0) -> Volume:
    """Return a head of sorts: an ellipsoid full of blobs."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=grid.shape), 2.5)
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in grid.shape), indexing="ij"))
    inside = (place**2 / np.array([0.5, 0.7, 0.6])[:, None, None, None]).sum(axis=0) < 1
    return Volume((inside * (100 + 40 * noise / noise.std()))[None].astype(np.float32), grid)


def displacement(
    degrees: tuple[float, float, float], shift_mm: tuple[float, float, float], about: np.ndarray
) -> np.ndarray:
    """Return the matrix of a rotation about a point and a shift."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(degrees)
    matrix[:3, 3] = about - matrix[:3, :3] @ about + shift_mm
    return matrix


def moved(volume: Volume, matrix: np.ndarray) -> Volume:
    return Volume(volume.array, Grid(volume.grid.shape, matrix @ volume.grid.affine))


def assert_same_place(found: np.ndarray, true: np.ndarray, grid: Grid, most_mm: float, most_deg: float) -> None:
    ends = np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(grid.shape) - 1)
    corners = np.c_[grid.to_world(ends), np.ones(8)]
    center = corners.mean(axis=0)
    turn = found[:3, :3] @ true[:3, :3].T
    assert np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))) < most_deg
    assert np.linalg.norm((found - true) @ center) < most_mm


@pytest.mark.parametrize("kind", ["RAS", "oblique"])
def test_a_known_place_is_found_again_and_always_the_same(kind: str) -> None:
    grid = make_grid(kind, (48, 44, 22))
    fixed = phantom(grid)
    true = displacement((6, -4, 9), (7, -5, 4), grid.to_world(np.array(grid.shape) / 2))
    moving = moved(fixed.with_array(200 - fixed.array), true)  # other contrast
    found = register_rigid(moving, fixed)
    assert_same_place(found.matrix, true, grid, 0.5, 0.5)
    assert found.overlap > 0.9
    assert found.inconsistency_mm < 1
    assert found.applied(moving).grid.to_world([5, 5, 5]) == pytest.approx(grid.to_world([5, 5, 5]), abs=1)
    assert register_rigid(moving, fixed).to_dict() == found.to_dict()


def test_images_that_have_nothing_in_common_are_refused() -> None:
    grid = make_grid("RAS", (32, 32, 20))
    noise = np.random.default_rng(5).normal(size=(2, 1, *grid.shape)).astype(np.float32)
    with pytest.raises(GeometryError, match="there and back ends") as caught:
        register_rigid(Volume(noise[0], grid), Volume(noise[1], grid))
    assert caught.value.reason == "registration"


@pytest.mark.realdata
def test_a_real_head_of_another_contrast(realdata: Path) -> None:
    study = realdata / "dicom/brain_mr_study"
    fixed, flair = medseg.load(study / "12-T1post-05670"), medseg.load(study / "36459-FLAIRreg-76244")
    true = displacement((5, -8, 10), (12, -20, 9), flair.grid.to_world(np.array(flair.grid.shape) / 2))
    found = register_rigid(moved(flair, true), fixed)
    assert_same_place(found.matrix, true, flair.grid, 1.0, 1.0)
