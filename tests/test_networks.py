"""What every network that can be planned must do: adapt, learn, keep its weights, and run in every runtime."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from medseg.errors import UsageError
from medseg.labels import make_labels
from medseg.model import runtime_cache
from medseg.model.plan import Plan
from medseg.model.runtime import PACKAGES, make_runtime
from medseg.model.weights import load_network, save_weights
from medseg.networks.build import build_network
from medseg.train.architectures import NETWORKS
from medseg.train.fingerprint import CaseFacts, Fingerprint, Intensities
from medseg.train.loss import deep_loss
from medseg.train.planner import Capacity, make_plan

each_network = pytest.mark.parametrize("name", NETWORKS)

NUMBERS = Intensities(mean=40, std=20, percentile_00_5=-60, percentile_99_5=120)
CPU = torch.device("cpu")
SMALL = Capacity(voxels=2**12, features=4)


def plan_of(name: str, channels: int = 1, spacing=(1.0, 1.0, 1.0), capacity: Capacity = SMALL, **options) -> Plan:
    shape = (40, 40, 40) if spacing[0] == 1 else (16, 128, 128)
    case = CaseFacts(name="x", shape=shape, spacing_mm=spacing, box=shape, nonzero=1.0, label_voxels={1: 9, 2: 9})
    facts = Fingerprint(
        name="x",
        channels=tuple(f"MR{n}" for n in range(channels)),
        labels=make_labels([(1, "organ"), (2, "tumor")]),
        cases=(case,),
        intensities=(NUMBERS,) * channels,
    )
    return make_plan(facts, capacity, network=name, **options)


def network_of(plan: Plan) -> nn.Module:
    torch.manual_seed(0)
    return build_network(plan.network, plan.inputs, plan.outputs)


def noise(plan: Plan, batch: int = 1, size: tuple[int, ...] | None = None) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, plan.inputs, *(size or plan.patch))


def heads_of(logits: Tensor | list[Tensor]) -> list[Tensor]:
    return logits if isinstance(logits, list) else [logits]


@each_network
@pytest.mark.parametrize("channels", [1, 4])
def test_every_weight_learns(name, channels):
    plan = plan_of(name, channels)
    network = network_of(plan).train()
    heads = heads_of(network(noise(plan, 2)))
    assert heads[0].shape == (2, plan.outputs, *plan.patch)
    torch.manual_seed(2)
    target = torch.randint(0, plan.outputs, (2, 1, *plan.patch))
    deep_loss("dice_ce", heads, target, None).backward()
    idle = [weight for weight, values in network.named_parameters() if values.grad is None]
    assert not idle
    assert all(bool(values.grad.isfinite().all()) for values in network.parameters())


@each_network
def test_steps_lower_the_loss(name):
    plan = plan_of(name)
    network, image = network_of(plan).train(), noise(plan, 1)
    target = (nn.functional.avg_pool3d(image, 5, 1, 2) > 0.05).long()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = deep_loss("dice_ce", heads_of(network(image)), target, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.9 * losses[0]


@each_network
def test_images_of_a_batch_do_not_look_at_each_other(name):
    """Neither in training, where batches of two are too small for statistics of a batch, nor in use."""
    plan = plan_of(name)
    network, image = network_of(plan), noise(plan, 2)
    for mode in (network.train(), network.eval()):
        together = heads_of(mode(image))[0]
        apart = torch.cat([heads_of(mode(one[None]))[0] for one in image])
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@each_network
def test_an_odd_patch_is_one_with_zeros_behind(name):
    plan = plan_of(name)
    size = tuple(edge - 3 for edge in plan.patch)
    network, image = network_of(plan).eval(), noise(plan, size=size)
    behind = nn.functional.pad(image, (0, 3, 0, 3, 0, 3))
    i, j, k = size
    with torch.inference_mode():
        torch.testing.assert_close(network(image), network(behind)[:, :, :i, :j, :k], rtol=1e-4, atol=1e-5)
    heads = heads_of(network.train()(image))
    assert heads[0].shape[2:] == size


@each_network
def test_flat_patches_are_halved_where_voxels_are_short(name):
    plan = plan_of(name, spacing=(5.0, 0.8, 0.8), capacity=Capacity(voxels=2**18, features=4))
    assert plan.patch == (16, 128, 128)
    network = network_of(plan).eval()
    with torch.inference_mode():
        logits = network(noise(plan))
    assert logits.shape == (1, plan.outputs, 16, 128, 128)
    assert bool(logits.isfinite().all())


@each_network
def test_half_precision_gives_nearly_the_same(name):
    plan = plan_of(name)
    network, image = network_of(plan).eval(), noise(plan)
    exact = network(image).detach()
    with torch.autocast("cpu", torch.bfloat16):
        half = network(image).detach()
        heads_of(network.train()(image))[0].float().square().mean().backward()
    assert float((half.float() - exact).abs().mean() / exact.std()) < 0.1
    assert all(values.grad is None or bool(values.grad.isfinite().all()) for values in network.parameters())


@each_network
def test_weights_come_back(name, tmp_path):
    plan = plan_of(name)
    network = network_of(plan).eval()
    save_weights(network, tmp_path / "fold_0.safetensors")
    loaded = load_network(Plan.model_validate_json(plan.model_dump_json()), tmp_path / "fold_0.safetensors").eval()
    with torch.inference_mode():
        assert torch.equal(network(noise(plan)), loaded(noise(plan)))


@each_network
def test_a_copy_is_independent(name):
    """The running mean of the weights is a copy that must not run through the network that it was made of."""
    plan = plan_of(name)
    network, image = network_of(plan).eval(), noise(plan)
    copied = copy.deepcopy(network)
    before = copied(image)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    torch.testing.assert_close(copied(image), before)
    assert not torch.equal(network(image), before)


@each_network
@pytest.mark.parametrize(("runtime", "odd"), [("openvino", 0), ("openvino", 3), ("onnx", 0)])
def test_runtimes_agree(name, runtime, odd, tmp_path, monkeypatch):
    missing = [package for package in PACKAGES[runtime] if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install medseg[{runtime}]")
    monkeypatch.setattr(runtime_cache, "folder", lambda: tmp_path)
    plan = plan_of(name)
    plan = plan.model_copy(update={"patch": tuple(edge - odd for edge in plan.patch)})
    network = network_of(plan).eval()
    with torch.inference_mode():
        expected = network(noise(plan))
    found = make_runtime(plan, [network], device=CPU, runtime=runtime, threads=1)(noise(plan))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.std()))
    best = expected.topk(2, dim=1).values
    sure = (best[:, 0] - best[:, 1]) > 4e-3 * float(expected.std())
    assert torch.equal(found.argmax(1)[sure], expected.argmax(1)[sure])
    assert float(sure.float().mean()) > 0.95


def test_a_network_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match=r"one of unet.*; not 'vgg'"):
        plan_of("vgg")


def test_a_depth_that_the_patch_does_not_have_is_refused():
    assert len(plan_of("unet", depth=2).network.strides) == 2
    with pytest.raises(UsageError, match="2 to 3 resolutions, and not 9"):
        plan_of("unet", depth=9)


@pytest.mark.parametrize("name", ["swin_unetr", "unetr"])
def test_a_width_that_a_network_cannot_have_is_refused(name):
    with pytest.raises(UsageError, match="cannot be so large"):
        plan_of(name, width=1024)
