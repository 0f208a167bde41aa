"""How large a patch a device can train on: by the memory of a GPU, by the measured speed of a CPU."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from medseg.model.plan import Plan
from medseg.train.architectures import NetworkOptions
from medseg.train.costs import noise, step_bytes
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
"""Of a GPU's memory that a step may take; the rest is for fragments, what has to be there twice, and the screen."""


def kept_capacity(folder: Path) -> Capacity:
    """Return the capacity that a model folder was planned for: that in capacity.json, or the fixed one."""
    file = folder / "capacity.json"
    return Capacity.load(file) if file.is_file() else FIXED


def find_capacity(
    facts: Fingerprint, device: torch.device, settings: TrainSettings | None = None, **options: Unpack[NetworkOptions]
) -> Capacity:
    """Return what a device can train on, for a dataset, a recipe and a network (`architectures.NetworkOptions`).

    Measuring a CPU takes some seconds; where all of its capacities would make the same plan, it is not done.
    Raises what `make_plan` raises.
    """
    settings = settings or TrainSettings()
    if device.type in {"cuda", "mps"}:
        return by_memory(facts, device, _memory_of(device), settings, **options)
    smallest = make_plan(facts, Capacity(voxels=SMALLEST), **options)
    if device.type != "cpu" or smallest == make_plan(facts, Capacity(voxels=LARGEST_CPU), **options):
        return FIXED
    return by_speed(measured_speed(smallest, settings.batch), settings.batch)


def _memory_of(device: torch.device) -> int:
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return torch.cuda.get_device_properties(device).total_memory


def by_memory(
    facts: Fingerprint, device: torch.device, memory: int, settings: TrainSettings, **options: Unpack[NetworkOptions]
) -> Capacity:
    """Return the largest capacity with which a training step fits into so many bytes of a GPU, or the smallest.

    The step is measured (`costs.step_bytes`); one that runs out of memory does not fit.
    """
    voxels, plan, fits = LARGEST_GPU, None, False
    while True:
        capacity = Capacity(device=device.type, voxels=voxels, features=GPU_FEATURES, memory_gb=memory / 2**30)
        before, plan = plan, make_plan(facts, capacity, **options)
        if plan != before:  # a small dataset has the same plan for most capacities
            fits = _fits(plan, settings, device, memory)
        if voxels == SMALLEST or fits:
            return capacity
        voxels //= 2


def _fits(plan: Plan, settings: TrainSettings, device: torch.device, memory: int) -> bool:
    try:
        return step_bytes(plan, settings, device) <= MEMORY_SHARE * memory
    except torch.OutOfMemoryError:
        return False


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
    sampler = Sampler([noise(plan)], plan, settings.seed, settings.foreground)
    ends: list[float] = []
    for _ in optimize(state, sampler, settings, Budget(steps=PROBE_STEPS)):
        ends.append(time.process_time() / torch.get_num_threads())
        if len(ends) > 1 and state.seconds > PROBE_S:
            break
    return batch * math.prod(plan.patch) / float(np.diff(ends).min())  # without the first, which warms up
