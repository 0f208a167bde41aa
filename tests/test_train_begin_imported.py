"""Trainings that begin with a model of nnU-Net: other labels, other channels, heads that it lacks, a frozen encoder."""

from __future__ import annotations

import json
from pathlib import Path

import nnunet_files as files
import numpy as np
import pytest
import torch
from datasets import make_shells
from torch import Tensor

from medseg import import_model
from medseg.errors import ModelError
from medseg.io import load, save
from medseg.model.plan import Plan
from medseg.model.segmenter import Model
from medseg.model.weights import begin_with, load_network, state_of
from medseg.networks.build import build_network
from medseg.process.normalize import CTNormalization, ZScore
from medseg.train.begin import plan_from
from medseg.train.dataset import read_dataset
from medseg.train.fingerprint import fingerprint
from medseg.train.loop import train_dataset, train_model
from medseg.train.settings import TrainSettings


def imported(folder: Path, *, residual: bool = False, channels: tuple[str, ...] = ("T1",)) -> Path:
    """Return a model that was read from nnU-Net's files: three outputs, no heads of lower resolutions."""
    schemes = ["ZScoreNormalization"] * len(channels)
    network = files.architecture(residual=residual)
    changes = {"normalization_schemes": schemes, "use_mask_for_norm": [False] * len(channels), "architecture": network}
    plan = files.plans({"3d_fullres": files.configuration(**changes)})
    data = files.dataset(channel_names={str(place): name for place, name in enumerate(channels)})
    files.write_model(folder / "nnunet", plan=plan, data=data, residual=residual, inputs=len(channels))
    import_model(folder / "nnunet", folder / "imported", orientation="RAS")
    return folder / "imported"


def with_channels(folder: Path, *names: str) -> Path:
    """Return a dataset whose every second channel is the negative of the first."""
    root = make_shells(folder, regions=False)
    for file in sorted((root / "images").glob("*.nii.gz")):
        image = load(file)
        for place in range(len(names)):
            sign = np.float32(-1 if place % 2 else 1)
            save(image.with_array(sign * image.array), file.with_name(file.name.replace(".nii", f"_{place:04}.nii")))
        file.unlink()
    content = json.loads((root / "dataset.json").read_text())
    content["channel_names"] = {str(place): name for place, name in enumerate(names)}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def begun(model: Path, root: Path) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Return the plan of a training that begins with a model, the model's weights, its own, and what is new of them."""
    dataset = read_dataset(root)
    plan = plan_from(model, dataset, fingerprint(dataset))
    network = build_network(plan.network, plan.inputs, plan.outputs)
    anew = begin_with(network, plan, model / "fold_0.safetensors")
    given = state_of(load_network(Plan.load(model / "plan.json"), model / "fold_0.safetensors"))
    return plan, given, state_of(network), anew


@pytest.mark.parametrize("residual", [False, True])
def test_heads_that_an_imported_model_lacks_are_added(tmp_path, residual):
    plan, given, own, anew = begun(imported(tmp_path, residual=residual), make_shells(tmp_path / "data", regions=False))
    assert plan.unet.heads == 1
    assert anew == {"outputs.1.weight", "outputs.1.bias"}
    assert all(torch.equal(own[name], weight) for name, weight in given.items())
    assert len(own) == len(given) + 2


def test_outputs_of_another_number_of_labels_begin_anew(tmp_path):
    root = make_shells(tmp_path / "data", regions=False)
    content = json.loads((root / "dataset.json").read_text())
    content["labels"] |= {"tumor": 3}
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="in no case: tumor"):
        plan, given, own, anew = begun(imported(tmp_path), root)
    assert [label.name for label in plan.labels] == ["shell", "core", "tumor"]
    assert anew == {f"outputs.{place}.{name}" for place in (0, 1) for name in ("weight", "bias")}
    assert own["outputs.0.weight"].shape[0] == 4
    assert all(torch.equal(own[name], weight) for name, weight in given.items() if name not in anew)


@pytest.mark.parametrize(("residual", "first"), [(False, "encoder.0.0.conv.weight"), (True, "stem.conv.weight")])
def test_a_channel_keeps_its_kernels_and_a_new_one_gets_the_mean(tmp_path, residual, first):
    model = imported(tmp_path, residual=residual, channels=("T1", "T2"))
    plan, given, own, anew = begun(model, with_channels(tmp_path / "data", "T2", "CT", "t1"))
    assert [channel.name for channel in plan.channels] == ["T2", "CT", "T1"]
    assert [type(channel.normalization) for channel in plan.channels] == [ZScore, CTNormalization, ZScore]
    old = given[first]
    assert torch.equal(own[first], torch.stack([old[:, 1], (old[:, 0] + old[:, 1]) / 2, old[:, 0]], dim=1))
    assert {name for name in anew if not name.startswith("outputs.")} == {first}


def test_as_many_channels_of_other_names_are_taken_in_their_order(tmp_path):
    plan, given, own, anew = begun(imported(tmp_path), make_shells(tmp_path / "data", regions=False))
    assert [channel.name for channel in plan.channels] == ["T1"]
    assert torch.equal(own["encoder.0.0.conv.weight"], given["encoder.0.0.conv.weight"])
    assert "encoder.0.0.conv.weight" not in anew


def test_channels_that_were_exchanged_bring_their_kernels(tmp_path):
    model = imported(tmp_path, channels=("T1", "T2"))
    plan, given, own, _ = begun(model, with_channels(tmp_path / "data", "T2", "T1"))
    assert [channel.name for channel in plan.channels] == ["T2", "T1"]
    first = "encoder.0.0.conv.weight"
    assert torch.equal(own[first], given[first].flip(1))


def test_other_channels_need_the_fingerprint(tmp_path):
    dataset = read_dataset(with_channels(tmp_path / "data", "T1", "T2"))
    with pytest.raises(ModelError, match="not known without its fingerprint") as refused:
        plan_from(imported(tmp_path), dataset)
    assert refused.value.reason == "channels"


def test_a_model_behind_another_one_is_no_beginning(tmp_path):
    model, dataset = imported(tmp_path), read_dataset(make_shells(tmp_path / "data", regions=False))
    Plan.load(model / "plan.json").model_copy(update={"previous": True}).save(model / "plan.json")
    with pytest.raises(ModelError, match="sees the labels of another model") as refused:
        plan_from(model, dataset)
    assert refused.value.reason == "unsupported"


def test_a_frozen_encoder_stays_and_the_rest_learns(tmp_path):
    """But for its first kernels where the channels are others: they have not learned to look at these."""
    model, root = imported(tmp_path, channels=("T1", "T2")), with_channels(tmp_path / "data", "T1", "PET", "T2")
    given = begun(model, root)[2]
    scores = train_dataset(root, tmp_path / "model", budget="4steps", folds=3, start=model, freeze_encoder=True)
    assert len(scores.cases) == 2
    assert TrainSettings.load(tmp_path / "model" / "train.json").frozen == "encoder"
    trained = state_of(Model.load(tmp_path / "model").networks[0])
    same = {name for name, weight in trained.items() if torch.equal(weight, given[name])}
    encoder = {name for name in trained if name.startswith("encoder.")}
    assert same == encoder - {"encoder.0.0.conv.weight"}
    assert {"outputs.1.weight", "up.0.weight"} <= trained.keys() - same


def test_an_encoder_is_frozen_only_where_it_has_learned(tmp_path):
    dataset = read_dataset(make_shells(tmp_path / "data", regions=False))
    settings = TrainSettings(folds=3, frozen="encoder")
    plan = plan_from(imported(tmp_path), dataset)
    with pytest.raises(ModelError, match="An encoder that has learned nothing") as refused:
        train_model(dataset, plan, tmp_path / "model", budget="1steps", settings=settings)
    assert refused.value.reason == "frozen"


def test_a_network_without_an_encoder_of_that_name_is_not_frozen(tmp_path):
    from medseg.train.options import freeze

    with pytest.raises(ModelError, match="no encoder that could be kept") as refused:
        freeze(torch.nn.Conv3d(1, 2, 1), TrainSettings(frozen="encoder"), ())
    assert refused.value.reason == "frozen"


def test_a_model_that_began_with_an_imported_one_goes_on_and_segments(tmp_path):
    model, root = imported(tmp_path), make_shells(tmp_path / "data")  # regions: other outputs, by sigmoids
    scores = train_dataset(root, tmp_path / "model", budget="3steps", folds=3, start=model)
    again = train_dataset(root, tmp_path / "model", budget="3steps", folds=3, start=model)
    assert scores.to_dict() == again.to_dict()
    labels = Model.load(tmp_path / "model").segment(load(root / "images" / "case_0.nii.gz"))
    assert set(np.unique(labels.array)) <= {0, 1, 2}
