from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import make_balls

from medseg.errors import ModelError
from medseg.labels import make_labels
from medseg.train import capacity, costs
from medseg.train.capacity import by_memory, by_speed, find_capacity, kept_capacity, measured_speed
from medseg.train.fingerprint import CaseFacts, Fingerprint, Intensities
from medseg.train.loop import plan_dataset
from medseg.train.planner import FIXED, Capacity, explain, make_plan
from medseg.train.settings import TrainSettings

CPU = torch.device("cpu")
GB = 2**30


def facts(shape, spacing=(1.0, 1.0, 1.0), labels=2):
    case = CaseFacts(name="x", shape=shape, spacing_mm=spacing, box=shape, nonzero=1, label_voxels={1: 10})
    numbers = Intensities(mean=40, std=20, percentile_00_5=-60, percentile_99_5=120)
    names = make_labels([(n, f"organ {n}") for n in range(1, labels + 1)])
    return Fingerprint(name="x", channels=("CT",), labels=names, cases=(case,), intensities=(numbers,))


def test_a_gpu_gets_the_largest_patch_whose_step_fits_its_memory(monkeypatch):
    """A step that takes 8 kB for each voxel and image, and runs out of memory above 30 GB."""

    def step_bytes(plan, settings, device):
        needed = settings.batch * math.prod(plan.patch) * 8 * 2**10
        if needed > 30 * GB:
            raise torch.OutOfMemoryError
        return needed

    monkeypatch.setattr(capacity, "step_bytes", step_bytes)
    large, cuda = facts((500, 500, 500)), torch.device("cuda")
    found = [by_memory(large, cuda, size * GB, TrainSettings()) for size in (0.5, 4, 8, 11, 16, 24, 40)]
    voxels = [one.voxels for one in found]
    assert voxels == sorted(voxels)
    assert voxels[0] == 2**16
    for one in found[1:]:
        plan = make_plan(large, one)
        needed = step_bytes(plan, TrainSettings(), cuda)
        assert needed <= 0.7 * one.memory_gb * GB
        doubled = make_plan(large, one.model_copy(update={"voxels": 2 * one.voxels}))
        assert 2 * math.prod(doubled.patch) * 8 * 2**10 > 0.7 * one.memory_gb * GB
        assert plan.unet.features[0] == 32
    assert voxels[-1] == 2**20  # 2**21 voxels run out of memory
    assert by_memory(large, cuda, 24 * GB, TrainSettings(batch=8)).voxels < found[5].voxels


def test_one_plan_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(capacity, "step_bytes", lambda plan, *_: measured.append(plan) or 2**50)
    assert by_memory(facts((36, 50, 35)), torch.device("cuda"), GB, TrainSettings()).voxels == 2**16
    assert len(measured) == 1


def test_the_network_that_is_asked_for_is_measured(monkeypatch):
    """A wide network takes more memory for each voxel, and more time."""
    mps = torch.device("mps")
    monkeypatch.setattr(capacity, "_memory_of", lambda device: GB)
    monkeypatch.setattr(capacity, "GPU_FEATURES", 4)
    monkeypatch.setattr(costs, "MEASURED_VOXELS", 2**13)
    large = facts((60, 60, 120))
    assert find_capacity(large, mps).voxels > find_capacity(large, mps, width=32).voxels
    widths = []
    monkeypatch.setattr(capacity, "measured_speed", lambda plan, batch: widths.append(plan.unet.features[0]) or 1.0)
    find_capacity(large, CPU, width=8)
    assert widths == [8]


def test_a_cpu_gets_a_patch_that_leaves_it_many_steps():
    assert {by_speed(speed, 2).voxels for speed in (190_000, 262_144, 340_000)} == {2**17}
    assert by_speed(500, 2).voxels == 2**16
    assert by_speed(1e9, 2).voxels == 2**18
    assert by_speed(262_144, 4).voxels == 2**16


def test_speed_is_measured_where_there_is_something_to_decide(monkeypatch):
    monkeypatch.setattr(capacity, "measured_speed", lambda plan, batch: math.prod(plan.patch) * batch)
    assert find_capacity(facts((36, 50, 35)), CPU) == FIXED
    assert find_capacity(facts((200, 200, 100)), CPU) == Capacity(device="cpu", voxels=2**16, voxels_per_s=128_000)


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
