"""Trainings that begin with a bundle of MONAI: its networks learn, keep what they keep, and segment."""

from __future__ import annotations

import monai_files as files
import pytest
import torch
from datasets import make_shells

from medseg import import_model
from medseg.io import load
from medseg.model.segmenter import Model
from medseg.model.weights import state_of
from medseg.train.loop import train_dataset


@pytest.mark.parametrize("kind", ["UNet", "SegResNet", "DynUNet"])
@pytest.mark.parametrize("roi", [[16, 16, 8], [15, 13, 9]])
def test_an_imported_network_is_trained_on(tmp_path, kind, roi):
    root = make_shells(tmp_path / "data", regions=False)
    config = files.inference(network_def=files.network_def(kind), roi=roi)
    files.write_bundle(tmp_path / "bundle", config, files.metadata())
    import_model(tmp_path / "bundle", tmp_path / "start")
    train_dataset(root, tmp_path / "model", budget="3steps", folds=3, start=tmp_path / "start")
    before, after = (state_of(Model.load(tmp_path / name).networks[0]) for name in ("start", "model"))
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    labels = Model.load(tmp_path / "model").segment(load(root / "images" / "case_0.nii.gz"))
    assert labels.array.max() <= 2
