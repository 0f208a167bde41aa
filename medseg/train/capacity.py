"""How large a patch a device can train on: by the memory of a GPU, by the measured speed of a CPU."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch

from medseg.model.plan import Plan
from medseg.train.cache import Prepared
from medseg.train.dataset_json import values_of
from medseg.train.fingerprint import Fingerprint
from medseg.train.optimize import new_state, optimize
from medseg.train.planner import FIXED, Capacity, make_plan
from medseg.train.sampler import Sampler
from medseg.train.settings import Budget, TrainSettings

SMALLEST, LARGEST_CPU, LARGEST_GPU = 2**16, 2**18, 2**21
"""Voxels of a patch: less than 40³ sees too little, more than 64³ did not pay on a CPU. Only powers of two lie between
them, so that a plan rarely hangs on the noise of a measurement."""

GPU_FEATURES = 32
"""At the finest resolution, as nnU-Net has."""

STEP_S = 1.5
"""What a step may take on a CPU, so that there are 1200 and more in half an hour. Two cores are to get 2**17 voxels:
they take one second, and half of it either way is within this limit."""

PROBE_S, PROBE_STEPS = 2.0, 10
"""How long steps are measured, but at least two, and at most so many."""

MEMORY_SHARE = 0.7
"""Of a GPU's memory; the rest is for weights, workspaces of convolutions, fragments, and the screen."""

LOSS_TENSORS = 5
"""Of the size of the logits at full resolution that the loss keeps for each output of the network: softmax and its
logarithm, the truth, and, where a structure was not drawn, the logits twice more."""

GRADIENTS = 3
"""Of the finest features that are there at once when the backward pass begins."""


def kept_capacity(folder: Path) -> Capacity:
    """Return the capacity that a model folder was planned for: that in capacity.json, or the fixed one."""
    file = folder / "capacity.json"
    return Capacity.load(file) if file.is_file() else FIXED


def find_capacity(facts: Fingerprint, device: torch.device, batch: int) -> Capacity:
    """Return what a device can train on, for a dataset and a number of patches in a batch.

    Measuring a CPU takes some seconds; where all of its capacities would make the same plan, it is not done.
    """
    if device.type == "cuda":
        return by_memory(facts, device.type, torch.cuda.get_device_properties(device).total_memory, batch)
    if device.type == "mps":
        return by_memory(facts, device.type, torch.mps.recommended_max_memory(), batch)
    smallest = make_plan(facts, Capacity(voxels=SMALLEST))
    if device.type != "cpu" or smallest == make_plan(facts, Capacity(voxels=LARGEST_CPU)):
        return FIXED
    return by_speed(measured_speed(smallest, batch), batch)


def by_memory(facts: Fingerprint, device: str, memory_bytes: int, batch: int) -> Capacity:
    """Return the largest capacity with which a training step fits into the memory of a GPU, or the smallest."""
    voxels = LARGEST_GPU
    while True:
        capacity = Capacity(device=device, voxels=voxels, features=GPU_FEATURES, memory_gb=memory_bytes / 2**30)
        needed = batch * patch_bytes(make_plan(facts, capacity), half=device == "cuda")
        if voxels == SMALLEST or needed <= MEMORY_SHARE * memory_bytes:
            return capacity
        voxels //= 2


def patch_bytes(plan: Plan, *, half: bool) -> int:
    """Return about how many bytes a training step takes for each patch, with a plain U-Net.

    Behind each convolution the backward pass needs what the normalization has read and what the activation has given,
    both float32, since autocast runs normalizations in it; with `half` the next convolution also keeps its input in
    half precision. The first of a decoder stage reads, and keeps, twice the features. To that come the loss and, when
    the backward pass begins, some gradients of the finest features.
    """
    net, voxels = plan.unet, math.prod(plan.patch)
    outputs = LOSS_TENSORS * (net.heads + 1) * plan.outputs
    kept = 4 * voxels * (plan.inputs + outputs + GRADIENTS * net.features[0])
    decoder = (*reversed(net.decoder_blocks), 0)  # none at the coarsest resolution
    for features, stride, *blocks in zip(net.features, net.strides, net.blocks, decoder, strict=True):
        voxels //= math.prod(stride)
        joined = 2 * (2 if half else 4) if blocks[1] else 0
        kept += voxels * features * (sum(blocks) * (10 if half else 8) + joined)
    return kept


def by_speed(voxels_per_s: float, batch: int) -> Capacity:
    """Return the largest capacity with which a training step takes no longer than it may, or the smallest."""
    power = math.floor(math.log2(voxels_per_s * STEP_S / batch))
    voxels = min(LARGEST_CPU, max(SMALLEST, 2**power))
    return Capacity(device="cpu", voxels=voxels, voxels_per_s=round(voxels_per_s))


def measured_speed(plan: Plan, batch: int) -> float:
    """Return the voxels of patches that the CPU trains on in a second: real steps of a plan, on noise.

    It is the speed of the fastest step, in processor time shared out to torch's threads: waiting for a core that other
    work has says nothing of the machine.
    """
    settings = TrainSettings(batch=batch, growth=1)  # steps of whole patches
    state = new_state(plan, settings, torch.device("cpu"))
    sampler = Sampler([_noise(plan)], plan, settings.seed, settings.foreground)
    ends: list[float] = []
    for _ in optimize(state, sampler, settings, Budget(steps=PROBE_STEPS)):
        ends.append(time.process_time() / torch.get_num_threads())
        if len(ends) > 1 and state.seconds > PROBE_S:
            break
    return batch * math.prod(plan.patch) / float(np.diff(ends).min())  # without the first, which warms up


def _noise(plan: Plan) -> Prepared:
    random = np.random.default_rng(0)
    image = random.standard_normal((plan.inputs, *plan.patch), np.float32)
    target = random.integers(0, len(values_of(plan.labels, plan.regions)) + 1, plan.patch)
    return Prepared("noise", image, target, {}, np.ones(plan.outputs, bool))
