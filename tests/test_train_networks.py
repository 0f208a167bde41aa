"""Networks from the command line and from Python: planned, trained, segmented with, and what cannot be asked for."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from datasets import make_balls
from test_cli import run  # noqa: F401 - a fixture
from torch import nn

from medseg.errors import ModelError, UsageError
from medseg.io import load
from medseg.model.plan import Plan
from medseg.model.segmenter import Model
from medseg.networks.build import build_network
from medseg.train.architectures import NETWORKS, Frame, unet
from medseg.train.dataset import read_dataset
from medseg.train.loop import plan_dataset, train_dataset, train_model
from medseg.train.options import add_dropout
from medseg.train.settings import TrainSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_balls(tmp_path_factory.mktemp("data") / "balls", cases=4, shape=(10, 12, 10))


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_trains_and_segments_from_the_command_line(run, folder, tmp_path, name):  # noqa: F811
    command = ("train", folder, tmp_path / "model", "--network", name, "--width", 4, "--size", "S")
    command = (*command, "--budget", "2steps", "--folds", 2, "--json")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    kept = (tmp_path / "model/fold_0.safetensors").read_bytes()
    assert run(*command)[:2] == (0, out)
    assert (tmp_path / "model/fold_0.safetensors").read_bytes() == kept
    rows = json.loads(run("plan", folder, tmp_path / "model", "--json")[1])["decisions"]
    (row,) = [row for row in rows if row["decision"] == "network"]
    assert row["value"].startswith(name)
    assert row["why"].startswith("yours")
    assert not any(row["why"].startswith("yours") for row in rows if row["decision"] != "network")
    scan = folder / "images/case_0.nii.gz"
    code, _, _ = run("segment", tmp_path / "model", scan, tmp_path / "out.nii.gz")
    assert code == 0
    assert np.array_equal(load(tmp_path / "out.nii.gz").grid.affine, load(scan).grid.affine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--network", "vgg"), "A network is one of unet, .*; not 'vgg'"),
        (("--width", 0), "1 to 1024 features at the finest resolution, not 0"),
        (("--width", 1025), "1 to 1024 features at the finest resolution, not 1025"),
        (("--depth", 1), "2 to 3 resolutions, and not 1"),
        (("--depth", 9), "2 to 3 resolutions, and not 9"),
        (("--size", "XL"), "S, M, L; not 'XL'"),
        (("--dropout", 1), "a share from 0 to below 1 .*; not 1"),
        (("--dropout", -0.1), "a share from 0 to below 1 .*; not -0.1"),
        (("--network", "unet", "--from", "hippocampus"), "omit the options"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_what_cannot_be_asked_for_is_one_line(run, folder, tmp_path, verb, options, message):  # noqa: F811
    code, out, err = run(verb, folder, tmp_path / "model", *options)
    assert (code, out) == (2, "")
    assert re.search(message, " ".join(err.split()))
    assert not (tmp_path / "model/fold_0.safetensors").exists()


def test_a_folder_with_another_network_is_not_followed_by_mistake(run, folder, tmp_path):  # noqa: F811
    model = tmp_path / "model"
    assert run("plan", folder, model, "--network", "attention_unet")[0] == 0
    kept = (model / "plan.json").read_text()
    for options in (("--network", "unet"), ("--network", "attention_unet", "--width", 5)):
        code, _, err = run("train", folder, model, *options, "--budget", "1steps")
        assert code != 0
        assert "another network than the one that is asked for" in " ".join(err.split())
    with pytest.raises(ModelError, match="another network"):
        plan_dataset(folder, model, network="residual_unet")
    assert run("plan", folder, model, "--network", "attention_unet")[0] == 0
    assert run("plan", folder, model)[0] == 0
    assert (model / "plan.json").read_text() == kept


def test_options_of_a_network_are_the_same_in_python(folder, tmp_path):
    scores = train_dataset(
        folder, tmp_path, budget="1steps", folds=2, network="residual_unet", width=4, depth=2, dropout=0.25
    )
    assert len(scores.cases) == 2
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.network.residual, plan.network.features, plan.network.blocks) == (True, (4, 8), (1, 3))
    assert TrainSettings.load(tmp_path / "train.json").dropout == 0.25
    with pytest.raises(UsageError, match="omit the options"):
        plan_dataset(folder, tmp_path / "other", start=tmp_path, depth=2)
    with pytest.raises(UsageError, match="Dropout is a share"):
        plan_dataset(folder, tmp_path, dropout=1.5)


def test_presets_halve_and_double_the_width_of_the_device_and_not_that_of_the_user():
    frame = {"widest": (32, 32, 32), "spacing_mm": (1.0, 1.0, 1.0), "width": 16}
    assert [unet(Frame(**frame, size=size)).features[0] for size in ("S", "M", "L")] == [8, 16, 32]
    assert unet(Frame(**frame, size="L", asked=True)).features[0] == 16


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_changes_each_network_in_training_alone(folder, tmp_path, name):
    _, plan = plan_dataset(folder, tmp_path, network=name, width=4, size="S")
    torch.manual_seed(0)
    network = build_network(plan.network, plan.inputs, plan.outputs)
    image = torch.randn(1, 1, *plan.patch)
    with torch.no_grad():
        before = network.eval()(image)
        add_dropout(network, 0.5)
        assert torch.equal(network(image), before)
        network.train()
        drawn = [network(image) for _ in range(2)]
    one, other = (heads[0] if isinstance(heads, list) else heads for heads in drawn)
    assert not torch.equal(one, other)


def test_dropout_drops_numbers_of_linear_layers_and_maps_of_convolutions_but_no_gate():
    layers = nn.ModuleDict({"linear": nn.Linear(3, 64), "conv": nn.Conv3d(1, 64, 1), "gate": nn.Conv3d(4, 1, 1)})
    layers["outputs"] = nn.Conv3d(1, 64, 1)
    add_dropout(layers.train(), 0.5)
    tokens = layers["linear"](torch.ones(1, 50, 3))
    assert 0.4 < float((tokens == 0).float().mean()) < 0.6
    assert 0 < int((tokens[0, :, 0] == 0).sum()) < 50  # not the same feature of all tokens
    maps = (layers["conv"](torch.randn(1, 1, 3, 3, 3)) == 0).flatten(2)
    assert torch.equal(maps.any(2), maps.all(2))
    assert 10 < int(maps.all(2).sum()) < 54
    assert all((layers[name](torch.randn(1, n, 3, 3, 3)) != 0).all() for name, n in (("gate", 4), ("outputs", 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_learns_one_case_by_heart(tmp_path, name):
    """With the default recipe: the case that trains is the one that is segmented."""
    folder = make_balls(tmp_path / "balls", cases=1, shape=(22, 24, 18))
    _, plan = plan_dataset(folder, tmp_path / "model", network=name)
    settings = TrainSettings()
    train_model(read_dataset(folder), plan, tmp_path / "model", budget="200steps", fold="none", settings=settings)
    found = Model.load(tmp_path / "model").segment(folder / "images/case_0.nii.gz").array > 0
    truth = load(folder / "labels/case_0.nii.gz").array > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.98
