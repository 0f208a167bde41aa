"""A dataset made in a moment: bright balls in noise, stored in several orientations and spacings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import rotation
from scipy.ndimage import binary_erosion

from medseg.io import load, save
from medseg.model.plan import Plan
from medseg.model.segmenter import Model
from medseg.model.weights import state_of
from medseg.train.dataset import Dataset
from medseg.train.fingerprint import fingerprint
from medseg.train.loop import train_model
from medseg.train.planner import make_plan
from medseg.train.run import TrainProgress
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


def make_shells(folder: Path, *, regions: bool = True, ignore: int | None = None, cases: int = 6) -> Path:
    """Write balls with a brighter core: 1 is the shell, 2 the core, and of the regions "ball" is both of them.

    With `ignore` the upper half of each label map has that value.
    """
    make_balls(folder, cases, (16, 18, 14))
    for case in range(cases):
        image, labels = (load(folder / part / f"case_{case}.nii.gz") for part in ("images", "labels"))
        core = binary_erosion(labels.array[0], iterations=2)
        values = labels.array + core.astype(np.uint8)
        if ignore is not None:
            values[..., values.shape[-1] // 2 :] = ignore
        save(image.with_array(image.array + 80 * core.astype(np.float32)), folder / "images" / f"case_{case}.nii.gz")
        save(labels.with_array(values), folder / "labels" / f"case_{case}.nii.gz")
    labels = {"background": 0} | ({"ball": [1, 2], "core": 2} if regions else {"shell": 1, "core": 2})
    content = {"channel_names": {"0": "MR"}, "labels": labels | ({} if ignore is None else {"ignore": ignore})}
    content |= {"regions_class_order": [1, 2]} if regions else {}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def small_plan(dataset: Dataset, features: int = 6) -> Plan:
    """Return the plan of a dataset with a network that trains in a moment."""
    plan = make_plan(fingerprint(dataset))
    network = plan.unet.model_copy(update={"features": (features,) * len(plan.unet.features)})
    return plan.model_copy(update={"network": network})


def assert_goes_on_as_if_not_stopped(dataset: Dataset, plan: Plan, folder: Path, step: int, **recipe: Any) -> None:
    """Train once with a stop after a step and once straight through, and compare the weights bit for bit."""

    def stop(now: TrainProgress) -> None:
        if now.stage == "train" and now.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_model(dataset, plan, folder / "stopped", **recipe, progress=stop)
    train_model(dataset, plan, folder / "stopped", **recipe)
    train_model(dataset, plan, folder / "straight", **recipe)
    stopped, straight = (state_of(Model.load(folder / name).networks[0]) for name in ("stopped", "straight"))
    assert all(torch.equal(tensor, straight[name]) for name, tensor in stopped.items())


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
