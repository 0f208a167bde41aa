"""What a plan costs: counted by hand, compared with what tensors truly hold, and the same however it is computed."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from models import tiny_plan
from torch import nn

from medseg.labels import make_labels
from medseg.networks import winograd
from medseg.networks.build import build_network
from medseg.train import costs
from medseg.train.architectures import NETWORKS
from medseg.train.costs import flop, noise, plan_costs, step_bytes, tile_s, tiles_of
from medseg.train.fingerprint import CaseFacts, Fingerprint, Intensities
from medseg.train.loss import deep_loss
from medseg.train.optimize import new_state, optimize
from medseg.train.planner import Capacity, make_plan
from medseg.train.sampler import Sampler
from medseg.train.settings import Budget, TrainSettings

CPU = torch.device("cpu")


def facts(shape=(40, 40, 40), labels=2):
    case = CaseFacts(name="x", shape=shape, spacing_mm=(1, 1, 1), box=shape, nonzero=1, label_voxels={1: 10})
    numbers = Intensities(mean=40, std=20, percentile_00_5=-60, percentile_99_5=120)
    names = make_labels([(n, f"organ {n}") for n in range(1, labels + 1)])
    return Fingerprint(name="x", channels=("CT",), labels=names, cases=(case,), intensities=(numbers,))


def small(name="unet", **options):
    return make_plan(facts(), Capacity(voxels=2**12, features=4), network=name, **options)


def test_operations_are_those_of_a_count_by_hand():
    """Two resolutions of 4 and 8 features on 8 x 8 x 8 voxels: a convolution takes 2 x kernel x in x out a voxel."""
    network = {
        "kind": "unet",
        "features": (4, 8),
        "kernels": ((3, 3, 3),) * 2,
        "strides": ((1, 1, 1), (2, 2, 2)),
        "heads": 0,
    }
    plan = tiny_plan(patch=(8, 8, 8), network=network)
    fine, coarse = 8**3, 4**3
    encoder = fine * 27 * (1 * 4 + 4 * 4) + coarse * 27 * (4 * 8 + 8 * 8)
    upward = coarse * 8 * 8 * 4
    decoder = fine * 27 * (8 * 4 + 4 * 4) + fine * 4 * 2
    assert flop(plan, CPU) == 2 * (encoder + upward + decoder)


def test_a_convolution_that_is_computed_faster_counts_as_it_is_defined(monkeypatch):
    plan = small()
    plain = flop(plan, CPU)
    monkeypatch.setattr(winograd, "WIDE", 1)
    monkeypatch.setattr(winograd, "LARGE", 1)
    assert flop(plan, CPU) == plain
    image = torch.randn(1, 4, 8, 8, 8)
    weight = torch.randn(4, 4, 3, 3, 3)
    assert winograd.pays(image, weight)
    with winograd.by_definition():
        assert not winograd.pays(image, weight)
    assert winograd.pays(image, weight)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_large_patches_cost_follows_from_small_ones(name, monkeypatch):
    """Attention over a whole patch grows faster than its voxels: what it adds is small beside the rest."""
    plan = make_plan(facts((64, 64, 64)), Capacity(voxels=2**15, features=4), network=name)
    exact = flop(plan, CPU), step_bytes(plan, TrainSettings(), CPU)
    monkeypatch.setattr(costs, "MEASURED_VOXELS", 2**13)
    scaled = flop(plan, CPU), step_bytes(plan, TrainSettings(), CPU)
    assert scaled == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("name", NETWORKS)
def test_memory_of_a_step_holds_what_the_backward_pass_keeps(name):
    plan, settings = small(name), TrainSettings()
    network = build_network(plan.network, plan.inputs, plan.outputs).train()
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    sizes, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or its address could be used again
        return tensor

    case = noise(plan)
    image = torch.as_tensor(case.image).repeat(2, 1, 1, 1, 1)
    target = torch.as_tensor(case.target).expand(2, 1, *plan.patch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(image)
        loss = deep_loss(settings.loss, logits if isinstance(logits, list) else [logits], target, None)
    assert loss.requires_grad
    of_weights = sum(weight.nbytes for weight in network.parameters()) * 5
    measured = step_bytes(plan, settings, CPU) - of_weights
    assert sum(sizes.values()) <= measured <= 2 * sum(sizes.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_optimizers_remember_is_no_more_than_is_counted(name):
    for optimizer, copies in costs.REMEMBERED.items():
        settings, plan = TrainSettings(optimizer=optimizer), small(name)
        state = new_state(plan, settings, CPU)
        sampler = Sampler([noise(plan)], plan, settings.seed, settings.foreground)
        list(optimize(state, sampler, settings, Budget(steps=1)))
        kept = [part for entry in state.optimizer.state.values() for part in entry.values() if part.numel() > 1]
        weights = sum(weight.nbytes for weight in state.network.parameters())
        assert 0 < sum(part.nbytes for part in kept) <= copies * weights


def test_a_recipe_that_keeps_less_costs_less():
    plan = make_plan(facts((32, 32, 32)), Capacity(voxels=2**15, features=8))
    plain, less, more = (
        step_bytes(plan, settings, CPU)
        for settings in (TrainSettings(), TrainSettings(checkpointing=True), TrainSettings(batch=4))
    )
    assert less < 0.9 * plain
    assert 1.5 * plain < more < 2 * plain


def test_tiles_of_a_scan_lie_half_a_patch_apart():
    plan = tiny_plan()
    assert tiles_of(plan, (16, 16, 8)) == 1
    assert tiles_of(plan, (32, 24, 6)) == 3 * 2 * 1
    tiling = {"overlap": (0.0, 0.0, 0.0), "blend": "constant"}
    assert tiles_of(tiny_plan(tiling=tiling), (32, 24, 6)) == 2 * 2 * 1


def test_costs_are_numbers_and_words(monkeypatch):
    monkeypatch.setattr(costs, "tile_s", lambda plan, device: 0.5)
    seen = []
    found = plan_costs(small(), facts(), device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert found.parameters == sum(weight.numel() for weight in build_network(small().network, 1, 3).parameters())
    assert found.scan_s == 0.5 * found.tiles
    assert seen[0] == (0, 3)
    assert seen[-1] == (3, 3)
    rows = {row["cost"]: row for row in found.rows()}
    assert rows["seconds a scan"]["value"].startswith("about ")
    assert rows["GFLOP a patch"]["value"] == f"{found.gflop_patch:,.1f}"
    assert plan_costs(small(), device="cpu").scan_s is None


def test_a_tile_takes_time():
    assert 0 < tile_s(small(), CPU) < 100


def test_what_cannot_be_measured_says_why(monkeypatch):
    class Broken(nn.Module):
        def forward(self, image):
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(costs, "build_network", lambda *_: Broken())
    found = plan_costs(small(), facts(), device="cpu")
    assert (found.gflop_patch, found.step_gb, found.scan_s) == (None, None, None)
    assert found.parameters > 0
    assert found.missing == "the network did not run (RuntimeError)"
    assert "not measured: the network did not run" in found.rows()[1]["how"]

    monkeypatch.setattr(costs, "memory_bytes", lambda: 2**10)
    assert "half of the memory" in plan_costs(small(), device="cpu").missing


def test_counting_loads_no_compiler(tmp_path):
    """It takes seconds, and a plan is to be told in few."""
    script = tmp_path / "count.py"
    small().save(tmp_path / "plan.json")
    script.write_text(
        "import sys, torch\n"
        "from medseg.model.plan import Plan\n"
        "from medseg.train.costs import flop, step_bytes\n"
        "from medseg.train.settings import TrainSettings\n"
        f"plan = Plan.load({str(tmp_path / 'plan.json')!r})\n"
        "device = torch.device('cpu')\n"
        "assert flop(plan, device) and step_bytes(plan, TrainSettings(), device)\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)


def test_the_measured_patch_has_room_for_a_normalization():
    plan = make_plan(facts((300, 300, 300)), Capacity(voxels=2**21, features=4))
    smaller, ratio = costs._measurable(plan, CPU)
    assert math.prod(smaller.patch) <= costs.MEASURED_VOXELS
    assert ratio == math.prod(plan.patch) / math.prod(smaller.patch)
    assert math.prod(smaller.patch) >= 2 * math.prod(plan.network.divisor)
    assert costs._measurable(plan, torch.device("cuda")) == (plan, 1.0)
