"""A dataset made in a moment: bright balls in noise, stored in several orientations and spacings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from conftest import rotation

from medseg.io import save
from medseg.volume import Grid, Volume

torch.set_num_threads(1)


def make_balls(folder: Path, cases: int = 6, shape: tuple[int, int, int] = (22, 24, 18)) -> Path:
    """Write a dataset in medseg's layout and return its folder."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for case in range(cases):
        image, labels = ball_case(case, shape)
        save(image, folder / "images" / f"case_{case}.nii.gz")
        save(labels, folder / "labels" / f"case_{case}.nii.gz")
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def ball_case(case: int, shape: tuple[int, int, int]) -> tuple[Volume, Volume]:
    random = np.random.default_rng(case)
    affine = np.diag([*random.uniform(0.9, 1.1, size=3), 1.0])
    affine[:3, :3] = rotation(tuple(random.uniform(-10, 10, size=3))) @ affine[:3, :3]
    grid = Grid(shape, affine).reoriented(("RAS", "LPS", "PIR")[case % 3])
    world = grid.to_world(np.stack(np.indices(grid.shape), axis=-1))
    center = grid.to_world((np.asarray(grid.shape) - 1) / 2 + random.uniform(-1.5, 1.5, size=3))
    inside = np.linalg.norm(world - center, axis=-1) < random.uniform(4, 5.5)
    image = (inside * 80 + random.normal(100, 15, size=grid.shape)).astype(np.float32)
    return Volume(image[None], grid), Volume(inside[None].astype(np.uint8), grid)
