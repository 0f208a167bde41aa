"""What a GPU computes is what a CPU computes, to rounding."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import make_balls, make_shells, small_plan
from models import tiny_model

from medseg import Model, SoftMaps, load
from medseg.model.weights import state_of
from medseg.networks.build import build_network, placed
from medseg.train import augment, feed
from medseg.train.augment import CHANGES, change_intensities, noise
from medseg.train.cache import prepare_cases
from medseg.train.dataset import read_dataset
from medseg.train.feed import batches, resident
from medseg.train.loop import train_model
from medseg.train.loss import LOSSES, REGION_LOSSES, WAITING, deep_loss
from medseg.train.optimize import ALONE, _changed, _follow, new_state, optimize
from medseg.train.record import Recorded, can_record
from medseg.train.run import TrainProgress
from medseg.train.sampler import Sampler
from medseg.train.schedules import make_optimizer, set_rates
from medseg.train.settings import Budget, TrainSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CUDA with the CPU, and there is no such GPU"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXACT = {"precision": "float32"}


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls, features=4)


@pytest.fixture(scope="module")
def prepared(balls, plan, tmp_path_factory):
    return prepare_cases(balls.cases, plan, tmp_path_factory.mktemp("cache"))


def samplers(prepared, plan) -> tuple[Sampler, Sampler]:
    return Sampler(prepared, plan, 5, 0.5), Sampler(resident(prepared, GPU), plan, 5, 0.5, GPU)


def test_cases_lie_on_the_gpu_where_they_fit(prepared, monkeypatch):
    assert all(
        case.image.device.type == "cuda" and case.image.dtype == torch.float16 for case in resident(prepared, GPU)
    )
    monkeypatch.setattr(feed, "MEMORY_SHARE", 0)
    assert resident(prepared, GPU) == prepared
    assert resident(prepared, CPU) == prepared


def test_patches_are_the_cpus(prepared, plan):
    plan = plan.model_copy(update={"mirror_axes": (0, 1, 2)})
    cpu, gpu = samplers(prepared, plan)
    for step in range(20):
        one, other = cpu.batch(step, range(3)), gpu.batch(step, range(3))
        # Cases are kept in half precision there: 2**-11 of values up to 4.
        torch.testing.assert_close(other.images.cpu(), one.images, atol=4e-3, rtol=0)
        assert (other.target.cpu() != one.target).float().mean() < 1e-3  # rounding halfway between two voxels
        assert torch.equal(other.seeds, one.seeds)


def test_changes_of_intensity_are_the_cpus_but_for_the_noise_itself(monkeypatch):
    images, seeds = torch.randn(24, 2, 12, 14, 10, generator=torch.Generator().manual_seed(1)), torch.arange(24)
    monkeypatch.setattr(augment, "CHANGES", tuple(one for one in CHANGES if one[0] is not noise))
    changed = change_intensities(images.clone(), seeds)
    assert not torch.equal(changed, images)
    torch.testing.assert_close(change_intensities(images.to(GPU), seeds).cpu(), changed, atol=1e-4, rtol=1e-4)


def test_noise_is_a_function_of_its_seed_and_of_the_deviation_that_was_drawn():
    channel = torch.zeros(40, 40, 40)
    drawn = [noise(channel.to(GPU), torch.Generator().manual_seed(3)).cpu() for _ in range(2)]
    assert torch.equal(*drawn)
    assert float(drawn[0].std()) > 0
    assert abs(float(drawn[0].mean())) < 0.01


@pytest.mark.parametrize("on_disk", [False, True], ids=["resident", "on disk"])
@pytest.mark.parametrize("patch_at", [None, lambda step: (8, 8, 8 if step < 12 else 16)], ids=["plan's", "growing"])
def test_batches_made_ahead_are_those_of_their_step(prepared, plan, monkeypatch, on_disk, patch_at):
    monkeypatch.setattr(augment, "CHANGES", ())
    monkeypatch.setattr(feed, "MEMORY_SHARE", 0 if on_disk else 0.3)
    sampler = Sampler(resident(prepared, GPU), plan, 5, 0.5, GPU)
    made = batches(sampler, range(2), 7, patch_at)
    for step in range(7, 20):
        patch = patch_at(step) if patch_at else None
        torch.testing.assert_close(next(made).images, sampler.batch(step, range(2), patch).images)
    made.close()


@pytest.mark.parametrize("known", [None, torch.tensor([[True, True, False], [True, True, True]])], ids=["all", "some"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_the_cpus(name, known):
    torch.manual_seed(2)
    logits, target = torch.randn(2, 3, 9, 8, 7), torch.randint(0, 3, (2, 1, 9, 8, 7))
    found = []
    for device in (CPU, GPU):
        own = logits.clone().to(device).requires_grad_()
        loss = deep_loss(name, [own], target.to(device), None if known is None else known.to(device))
        loss.backward()
        found.append((loss.detach().cpu(), own.grad.cpu()))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_losses_of_regions_are_the_cpus(name):
    torch.manual_seed(2)
    logits, target = torch.randn(2, 3, 9, 8, 7), torch.randint(-1, 2, (2, 3, 9, 8, 7))
    losses = [deep_loss(name, [logits.to(device)], target.to(device), None).cpu() for device in (CPU, GPU)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_loss_of_ours_waits_for_the_gpu():
    logits, target = torch.randn(2, 3, 9, 8, 7, device=GPU), torch.randint(0, 3, (2, 1, 9, 8, 7), device=GPU)
    known = torch.ones(2, 3, dtype=torch.bool, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in set(LOSSES) - set(WAITING):
            deep_loss(name, [logits], target, None)
            deep_loss(name, [logits], target, known)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("growth", [1, 2])
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_recorded_steps_are_those_that_are_taken_one_by_one(prepared, plan, monkeypatch, optimizer, growth):
    settings = TrainSettings(optimizer=optimizer, learning_rate=1e-3, precision="float32", growth=growth)
    weights = []
    for can in (True, False):
        state = new_state(plan, settings, GPU)
        assert can_record(state, settings)
        monkeypatch.setattr("medseg.train.optimize.can_record", lambda *_, can=can: can)
        losses = list(chain(*optimize(state, samplers(prepared, plan)[1], settings, Budget(steps=12))))
        weights.append((torch.tensor(losses), *state_of(state.average).values()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_waits_for_nothing(prepared, plan):
    settings = TrainSettings()
    state = new_state(plan, settings, GPU)
    batch = next(batches(samplers(prepared, plan)[1], range(2), 0))
    step = Recorded(partial(_changed, state, settings, ALONE))
    for _ in range(5):  # until it is recorded
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            set_rates(state.optimizer, settings, 0.5)
            step(batch)
            _follow(state, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_steps_of_an_optimizer_are_the_cpus(plan, name):
    settings = TrainSettings(optimizer=name)
    torch.manual_seed(0)
    network = build_network(plan.network, 1, plan.outputs)
    both = [(placed(copy.deepcopy(network), device), device) for device in (CPU, GPU)]
    optimizers = [make_optimizer(one, settings) for one, _ in both]
    for step in range(3):
        torch.manual_seed(step)
        drawn = [torch.randn_like(weight) for weight in network.parameters()]
        for (one, device), optimizer in zip(both, optimizers, strict=True):
            for weight, gradient in zip(one.parameters(), drawn, strict=True):
                weight.grad = gradient.to(device)
            optimizer.step()
    for weight, other in zip(both[0][0].parameters(), both[1][0].parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), weight, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes", [EXACT, {}, {"optimizer": "adamw"}, {"dropout": 0.2}, {"checkpointing": True}], ids=str
)
def test_losses_of_a_training_fall_as_on_the_cpu(prepared, plan, changes):
    cpu, gpu = samplers(prepared, plan)
    losses = []
    for sampler, device in ((cpu, CPU), (gpu, GPU)):
        settings = TrainSettings(folds=3, **changes)
        state = new_state(plan, settings, device)
        read = list(optimize(state, sampler, settings, Budget(steps=60)))
        assert (state.step, len(read) - 60) == (60, device.type == "cuda")  # and what is left, at the end
        losses.append(np.mean(list(chain(*read))[-20:]))
    assert losses[1] == pytest.approx(losses[0], abs=0.15)


def test_a_training_goes_on_from_its_checkpoint(balls, plan, tmp_path):
    def stop_at_40(now: TrainProgress) -> None:
        if now.stage == "train" and now.step == 40:
            raise KeyboardInterrupt

    recipe = {"budget": "80steps", "settings": TrainSettings(folds=3), "device": "cuda"}
    with pytest.raises(KeyboardInterrupt):
        train_model(balls, plan, tmp_path / "stopped", **recipe, progress=stop_at_40)
    stopped = train_model(balls, plan, tmp_path / "stopped", **recipe)
    straight = train_model(balls, plan, tmp_path / "straight", **recipe)
    # Sums on a GPU come in another order each time: near, not equal.
    for name, tensor in state_of(stopped.networks[0]).items():
        torch.testing.assert_close(tensor, state_of(straight.networks[0])[name], atol=0.05, rtol=0.5)


@pytest.mark.parametrize("turn", ["straight", "oblique", "sheared"])
def test_labels_and_probabilities_are_the_cpus(tmp_path, turn):
    volume = load(make_balls(tmp_path, cases=1, shape=(30, 34, 26)) / "images" / "case_0.nii.gz")
    affine = volume.grid.affine.copy()
    if turn == "straight":
        affine = np.diag([1.1, 0.9, 1.3, 1.0])
    if turn == "sheared":
        affine[:3, 2] += 0.3 * affine[:3, 1]
    volume = type(volume)(volume.array, type(volume.grid)(volume.grid.shape, affine))
    cpu = tiny_model()
    gpu = Model(cpu.plan, [copy.deepcopy(cpu.networks[0])], GPU, precision="float32")
    maps = [SoftMaps(probabilities=True) for _ in range(2)]
    labels = [model.segment(volume, soft=soft) for model, soft in zip((cpu, gpu), maps, strict=True)]
    assert (labels[0].array != labels[1].array).mean() < 1e-4
    np.testing.assert_allclose(maps[1].probabilities.array, maps[0].probabilities.array, atol=1e-3)


def test_float32_is_float32_and_tf32_has_a_name():
    cpu = tiny_model()
    image = torch.randn(1, 1, *cpu.plan.patch)
    expected = cpu.runtime(image)
    off = {}
    for precision in ("float32", "tf32"):
        model = Model(cpu.plan, [copy.deepcopy(cpu.networks[0])], GPU, precision=precision)
        off[precision] = float((model.runtime(image.to(GPU)).cpu() - expected).abs().max())
    assert off["float32"] < 1e-4
    assert torch.backends.cudnn.allow_tf32  # what others compute is left alone


def test_regions_and_ignored_voxels_train(tmp_path):
    dataset = read_dataset(make_shells(tmp_path / "shells", ignore=3))
    plan = small_plan(dataset, features=4)
    train_model(dataset, plan, tmp_path / "model", budget="30steps", settings=TrainSettings(folds=3), device="cuda")
    assert (tmp_path / "model" / "fold_0.safetensors").is_file()
