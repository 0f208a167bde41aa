"""The U-Net++: what its nodes join, and that a trained one holds a network of each lower depth."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from models import tiny_plan
from torch import nn

from medseg import cli
from medseg.errors import ModelError, UsageError
from medseg.model.plan import Plan
from medseg.model.prune import prune_model
from medseg.model.segmenter import Model
from medseg.model.weights import save_weights
from medseg.networks.build import build_network
from medseg.networks.kinds import NestedNetwork, Network
from medseg.volume import Grid, Volume

FLAT = NestedNetwork(
    features=(3, 4, 5, 6),
    kernels=((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 1), (2, 2, 2), (1, 2, 2)),
)


def nested(numbers: NestedNetwork = FLAT, inputs: int = 2, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_network(numbers, inputs, outputs)


def size(network: nn.Module) -> int:
    return sum(math.prod(weight.shape) for weight in network.parameters())


def model_folder(folder, numbers: NestedNetwork = FLAT):
    plan = tiny_plan(network=numbers, patch=(16, 16, 8))
    folder.mkdir()
    plan.save(folder / "plan.json")
    for fold in range(2):
        torch.manual_seed(fold)
        save_weights(build_network(numbers, 1, 2), folder / f"fold_{fold}.safetensors", recipe=f"recipe {fold}")
    return folder


class HeadOf(nn.Module):
    """The head of a depth of a whole U-Net++ of four resolutions."""

    def __init__(self, whole: nn.Module, depth: int):
        super().__init__()
        self.whole, self.depth = whole, depth

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.whole.train()(image)[4 - self.depth]


def scan() -> Volume:
    array = np.random.default_rng(0).normal(size=(1, 20, 18, 11)).astype(np.float32)
    return Volume(array, Grid((20, 18, 11), np.diag([1.0, 1.0, 1.0, 1.0])))


def test_every_node_of_the_finest_resolution_has_a_head_of_full_size():
    network, image = nested(), torch.randn(2, 2, 13, 16, 5)
    heads = network.train()(image)
    assert [tuple(head.shape) for head in heads] == [(2, 3, 13, 16, 5)] * 3
    torch.testing.assert_close(network.eval()(image), heads[0])


def test_nodes_join_all_earlier_ones_of_their_resolution():
    joined = {
        (level, place): node.stage[0].conv.in_channels
        for level, row in enumerate(nested().nodes)
        for place, node in enumerate(row, start=1)
    }
    # j earlier nodes, and what comes up, each as wide as the resolution
    assert joined == {(0, 1): 6, (0, 2): 9, (0, 3): 12, (1, 1): 8, (1, 2): 12, (2, 1): 10}


def test_a_node_sees_its_neighbors_in_the_grid_alone():
    """X(0, 1) has no path from the coarsest resolutions, X(0, 3) has one from all."""
    network, image = nested().train(), torch.randn(1, 2, 16, 16, 4)
    for head, blind in zip(network(image), (set(), {3}, {2, 3}), strict=True):
        network.zero_grad(set_to_none=True)
        head.square().sum().backward(retain_graph=True)
        idle = {level for level, stage in enumerate(network.encoder) if stage[0].conv.weight.grad is None}
        assert idle == blind


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_pruned_it_is_the_network_built_so(depth):
    """The same weights under the same names, and the logits of the head of that depth."""
    whole, smaller = nested(), nested(FLAT.pruned(depth))
    weights = whole.state_dict()
    assert {name: value.shape for name, value in smaller.state_dict().items()} == {
        name: weights[name].shape for name in smaller.state_dict()
    }
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    image = torch.randn(1, 2, 16, 16, 4)
    heads = whole.train()(image)
    torch.testing.assert_close(smaller.eval()(image), heads[4 - depth])
    assert (size(smaller) < size(whole)) == (depth < 4)


def test_parameters_are_as_many_as_counted_by_hand():
    """Two resolutions of 3 and 4 features: convolutions, one scale and one shift for each feature, and the head."""
    network = nested(FLAT.pruned(2))
    encoder = 9 * (2 * 3 + 3 * 3) + 9 * (3 * 4 + 4 * 4) + 4 * 3 + 4 * 4
    node = (4 * 3 * 4 + 3) + 9 * (6 * 3 + 3 * 3) + 4 * 3  # the stride is 2, 2, 1
    assert size(network) == encoder + node + (3 * 3 + 3)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_pruned_model_segments_as_its_head_does(depth, tmp_path):
    folder = model_folder(tmp_path / "whole")
    plan = prune_model(folder, tmp_path / "pruned", depth=depth)
    assert plan == Plan.load(tmp_path / "pruned/plan.json")
    whole = Model.load(folder, device="cpu", runtime="torch")
    whole.networks = [HeadOf(network, depth) for network in whole.networks]
    pruned = Model.load(tmp_path / "pruned", device="cpu", runtime="torch")
    labels = pruned.segment(scan()).array
    assert len(np.unique(labels)) == 2
    np.testing.assert_array_equal(labels, whole.segment(scan()).array)


def test_the_verb_prune_writes_a_smaller_model(tmp_path, monkeypatch, capsys):
    folder = model_folder(tmp_path / "whole")
    (folder / "fold_0.scores.json").write_text("{}")
    (folder / "train.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["medseg", "prune", str(folder), str(tmp_path / "out"), "--depth", "2"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0, capsys.readouterr().err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("plan.json", "train.json", "fold_0.safetensors", "fold_1.safetensors"),
    }
    assert "MB before" in capsys.readouterr().out
    sizes = [(place / "fold_0.safetensors").stat().st_size for place in (folder, tmp_path / "out")]
    assert sizes[1] < sizes[0] / 2


def test_what_cannot_be_pruned_is_refused(tmp_path):
    folder = model_folder(tmp_path / "whole")
    with pytest.raises(UsageError, match="2 to 4 resolutions, and not to 5"):
        prune_model(folder, tmp_path / "out", depth=5)
    with pytest.raises(UsageError, match="2 to 4 resolutions, and not to 1"):
        prune_model(folder, tmp_path / "out", depth=1)
    with pytest.raises(UsageError, match="a folder of its own"):
        prune_model(folder, folder, depth=2)
    with pytest.raises(ModelError, match="Only a U-Net\\+\\+"):
        prune_model("hippocampus", tmp_path / "out", depth=2)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="to prune has no weights"):
        prune_model(folder, tmp_path / "out", depth=2)
    assert not (tmp_path / "out").exists()


def test_numbers_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="one entry per resolution"):
        NestedNetwork(features=(3, 4, 5), kernels=FLAT.kernels, strides=FLAT.strides)


@pytest.mark.parametrize("kind", [Network, NestedNetwork])
def test_kernels_without_a_middle_are_refused_before_they_meet_a_patch(kind):
    numbers = FLAT.model_dump(exclude={"kind", "blocks"}) | ({"heads": 1} if kind is Network else {})
    kind(**numbers)
    with pytest.raises(ValueError, match="odd sizes"):
        kind(**numbers | {"kernels": ((3, 3, 2), *FLAT.kernels[1:])})
