from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import make_balls

from medseg.errors import ModelError
from medseg.labels import make_labels
from medseg.networks.build import build_network, placed
from medseg.train import capacity
from medseg.train.capacity import by_memory, by_speed, find_capacity, kept_capacity, measured_speed, patch_bytes
from medseg.train.fingerprint import CaseFacts, Fingerprint, Intensities
from medseg.train.loop import plan_dataset
from medseg.train.loss import deep_loss
from medseg.train.planner import FIXED, Capacity, explain, make_plan

CPU = torch.device("cpu")
GB = 2**30


def facts(shape, spacing=(1.0, 1.0, 1.0), labels=2):
    case = CaseFacts(name="x", shape=shape, spacing_mm=spacing, box=shape, nonzero=1, label_voxels={1: 10})
    numbers = Intensities(mean=40, std=20, percentile_00_5=-60, percentile_99_5=120)
    names = make_labels([(n, f"organ {n}") for n in range(1, labels + 1)])
    return Fingerprint(name="x", channels=("CT",), labels=names, cases=(case,), intensities=(numbers,))


class Kept:
    """Counts the memory that tensors kept for a backward pass take, each storage once, without the weights."""

    def __init__(self, network):
        self.weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
        self.sizes, self.tensors = {}, []

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        self.tensors.append(tensor)  # or its address could be used again
        return tensor

    @property
    def bytes(self):
        return sum(self.sizes.values())


@pytest.mark.parametrize("print_of", [facts((40, 40, 40), labels=1), facts((64, 64, 12), (1, 1, 5), labels=9)])
def test_the_estimate_of_memory_is_what_a_forward_pass_keeps(print_of):
    plan = make_plan(print_of, Capacity(features=8))
    network = placed(build_network(plan.unet, 1, plan.outputs), CPU).train()
    image, target = torch.randn(1, 1, *plan.patch), torch.randint(plan.outputs, (1, 1, *plan.patch))
    known = torch.arange(plan.outputs)[None] != 1  # a structure that was not drawn takes memory, too
    kept = Kept(network)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        logits = network(image)
        of_network = kept.bytes
        loss = deep_loss("dice_ce", logits, target, known)
    assert loss.requires_grad
    estimate = patch_bytes(plan, half=False)
    voxels = 4 * math.prod(plan.patch)
    of_loss = voxels * capacity.LOSS_TENSORS * (plan.unet.heads + 1) * plan.outputs
    gradients = voxels * capacity.GRADIENTS * plan.unet.features[0]
    assert estimate - of_loss - gradients == pytest.approx(of_network, rel=0.03)
    assert kept.bytes <= estimate - gradients <= 1.2 * kept.bytes


def test_a_gpu_gets_the_largest_patch_that_fits_its_memory():
    large = facts((500, 500, 500))
    found = [by_memory(large, "cuda", size * GB, 2) for size in (0.5, 4, 8, 11, 16, 24, 40, 80)]
    voxels = [one.voxels for one in found]
    assert voxels == sorted(voxels)
    assert voxels[0] == 2**16
    assert voxels[-1] == 2**21
    for one in found[1:]:
        needed = 2 * patch_bytes(make_plan(large, one), half=True)
        assert needed <= 0.7 * one.memory_gb * GB
        assert make_plan(large, one).unet.features[0] == 32
    assert by_memory(large, "cuda", 24 * GB, 8).voxels < by_memory(large, "cuda", 24 * GB, 2).voxels
    assert by_memory(facts((500, 500, 500), labels=117), "cuda", 24 * GB, 2).voxels < found[5].voxels


def test_a_cpu_gets_a_patch_that_leaves_it_many_steps():
    assert {by_speed(speed, 2).voxels for speed in (190_000, 262_144, 340_000)} == {2**17}
    assert by_speed(500, 2).voxels == 2**16
    assert by_speed(1e9, 2).voxels == 2**18
    assert by_speed(262_144, 4).voxels == 2**16


def test_speed_is_measured_where_there_is_something_to_decide(monkeypatch):
    monkeypatch.setattr(capacity, "measured_speed", lambda plan, batch: math.prod(plan.patch) * batch)
    assert find_capacity(facts((36, 50, 35)), CPU, 2) == FIXED
    assert find_capacity(facts((200, 200, 100)), CPU, 2) == Capacity(device="cpu", voxels=2**16, voxels_per_s=128_000)


def test_real_steps_are_what_is_measured(monkeypatch):
    monkeypatch.setattr(capacity, "PROBE_S", 0)
    plan = make_plan(facts((16, 16, 16)), Capacity(features=4))
    assert 0 < measured_speed(plan, 1) < 1e9


def test_a_plan_made_again_is_the_same_and_says_what_it_was_made_for(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "SMALLEST", 2**9)
    monkeypatch.setattr(capacity, "measured_speed", lambda plan, batch: 1_000.0)
    root, model = make_balls(tmp_path / "balls", cases=3), tmp_path / "model"
    plan = plan_dataset(root, model, device="cpu")[1]
    assert np.prod(plan.patch) <= 2**9
    rows = {
        row["decision"]: row["why"]
        for row in explain(Fingerprint.load(model / "fingerprint.json"), plan, kept_capacity(model))
    }
    assert "within 512 voxels for cpu, measured to train on 1,000 voxels a second" in rows["patch"]
    assert not any(why.startswith("yours") for why in rows.values())

    monkeypatch.setattr(capacity, "measured_speed", lambda plan, batch: 1e9)  # another day it is faster
    assert plan_dataset(root, model, device="cpu")[1] == plan
    (model / "plan.json").unlink()
    assert plan_dataset(root, model, device="cpu")[1] == plan

    (model / "plan.json").unlink()
    Capacity(device="cuda", voxels=2**21, features=32, memory_gb=24).save(model / "capacity.json")
    assert plan_dataset(root, model, device="cpu")[1] == make_plan(Fingerprint.load(model / "fingerprint.json"))
    assert kept_capacity(model).device == "cpu"


def test_a_capacity_that_makes_no_sense_is_refused(tmp_path):
    (tmp_path / "capacity.json").write_text(json.dumps({"voxels": 0}))
    with pytest.raises(ModelError, match="voxels"):
        kept_capacity(tmp_path)
