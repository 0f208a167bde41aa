"""MONAI bundles become model folders: the same labels as MONAI's own workflow, and refusals by name."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import monai_files as files
import numpy as np
import pytest
import torch
from conftest import make_grid

import medseg
from medseg.errors import ModelError
from medseg.model.importing import import_model
from medseg.model.segmenter import Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The model does not say how its training images were stored"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:monai"),
]

KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(kind == "SwinUNETR" and not find_spec("einops"), reason="einops is not installed")
    )
    for kind in files.NETWORKS
]


def dice(found, expected):
    """Return the Dice of all foreground labels, the smallest."""
    values = np.unique(expected[expected > 0])
    assert values.size
    return min(2 * ((found == v) & (expected == v)).sum() / ((found == v).sum() + (expected == v).sum()) for v in values)


def beside(tmp_path, config, grid, meta=None):
    """Return labels of medseg and of MONAI for one scan, and the plan."""
    network = files.write_bundle(tmp_path / "bundle", config, meta)
    plan = import_model(tmp_path / "bundle", tmp_path / "model")
    files.write_scan(tmp_path / "scan.nii.gz", grid)
    model = Model.load(tmp_path / "model", device="cpu", runtime="torch")
    found = model.segment(medseg.load(tmp_path / "scan.nii.gz")).array[0]
    return found, files.run_monai(config, network, tmp_path / "scan.nii.gz"), plan


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_monai_whatever_the_orientation(tmp_path, kind, grid):
    roi = [32, 32, 32] if kind == "SwinUNETR" else [16, 16, 8]
    config = files.inference(network_def=files.network_def(kind), roi=roi)
    grid = make_grid(grid.orientation, (21, 18, 23)) if grid.orientation != "RAS" else grid
    found, expected, _ = beside(tmp_path, config, grid)
    assert dice(found, expected[0]) >= 0.999
