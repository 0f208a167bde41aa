"""What a plan costs on a device, measured on noise: parameters, operations, memory of a step, time of a scan."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from medseg.cores import memory_bytes
from medseg.errors import MedsegError
from medseg.model.plan import Plan
from medseg.model.runtime import make_runtime
from medseg.model.segmenter import STEP, pick_device
from medseg.model.weights import shapes_of
from medseg.model.window import Window
from medseg.networks.build import build_network, placed
from medseg.networks.kinds import Triple
from medseg.networks.winograd import by_definition
from medseg.train.cache import Prepared
from medseg.train.dataset_json import values_of
from medseg.train.fingerprint import Fingerprint
from medseg.train.loss import deep_loss
from medseg.train.optimize import new_state, optimize
from medseg.train.options import autocast, forward_of
from medseg.train.planner import median_shape
from medseg.train.sampler import Sampler
from medseg.train.settings import Budget, TrainSettings

MEASURED_VOXELS, MEASURED_BATCH = 2**16, 2
"""Of the patches that a CPU is measured with; what larger ones cost grows with their voxels."""

REMEMBERED = {"muon": 2, "adamw": 2, "sgd": 1}
"""Numbers for each weight, at most, that an optimizer keeps from step to step."""

COPIES = 3 + max(REMEMBERED.values())
"""Of the weights in a step: themselves, their mean, gradients, and what an optimizer remembers of them."""

TURNS = 2
"""Tiles that are timed; the fastest counts."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Costs:
    """What a plan costs on a device. What could not be measured is None, and `missing` says why.

    `gflop_patch` counts 10^9 floating-point operations of one patch through the network in use, a multiplication and
    an addition as two. `step_gb` is the most that tensors of a training step hold, in 2^30 bytes: weights, their mean,
    gradients, the optimizer's state and what the backward pass keeps; what Python and libraries take comes to it.
    `scan_s` is about the seconds that the network, in torch, takes for the `tiles` of the median case of the dataset.
    """

    device: str
    parameters: int
    gflop_patch: float | None = None
    step_gb: float | None = None
    tiles: int | None = None
    scan_s: float | None = None
    missing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON takes them."""
        return asdict(self)

    def rows(self) -> list[dict[str, str]]:
        """Return a row for each cost in words: what it is, how much, and how it is known."""
        unknown = f"not measured: {self.missing}" if self.missing else "not measured"
        return [
            {"cost": "parameters", "value": f"{self.parameters:,}", "how": "counted"},
            {
                "cost": "GFLOP a patch",
                "value": "" if self.gflop_patch is None else f"{self.gflop_patch:,.1f}",
                "how": unknown if self.gflop_patch is None else "counted; a multiplication and an addition are two",
            },
            {
                "cost": "memory of a step",
                "value": "" if self.step_gb is None else f"about {self.step_gb:.2f} GB",
                "how": unknown if self.step_gb is None else "measured: the tensors of a training step",
            },
            {
                "cost": "seconds a scan",
                "value": "" if self.scan_s is None else f"about {self.scan_s:.2g}",
                "how": unknown if self.scan_s is None else f"measured: one tile on {self.device}, in torch, of the "
                f"{self.tiles} of the median case",
            },
        ]  # fmt: skip


def plan_costs(
    plan: Plan,
    facts: Fingerprint | None = None,
    *,
    settings: TrainSettings | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Costs:
    """Return what a plan costs on a device, by default the fastest there is; `facts` tell how large a scan is.

    A step and a tile run on noise, on a CPU with at most MEASURED_VOXELS of a patch, so that it takes seconds. Where
    something cannot be measured, as where memory does not suffice, the reason stands in `missing`.
    Raises UsageError for a device that is not there.
    Example: plan_costs(make_plan(facts, network="unet"), facts).gflop_patch
    """
    where, settings = pick_device(device), settings or TrainSettings()
    parameters = sum(weight.numel() for weight in shapes_of(plan).parameters())
    found = Costs(device=where.type, parameters=parameters)
    if facts is not None:
        found = _with(found, tiles=tiles_of(plan, median_shape(facts.cases, plan.spacing_mm)))
    if 4 * COPIES * parameters > memory_bytes() / 2:
        return _with(found, missing="the weights would take half of the memory of this machine")
    parts: list[Callable[[], dict[str, Any]]] = [
        lambda: {"gflop_patch": flop(plan, where) / 1e9},
        lambda: {"step_gb": step_bytes(plan, settings, where) / 2**30},
        lambda: {"scan_s": found.tiles * tile_s(plan, where) if found.tiles else None},
    ]
    for done, part in enumerate(parts):
        if progress:
            progress(done, len(parts))
        try:
            found = _with(found, **part())
        except (MedsegError, RuntimeError, ValueError) as error:  # torch's, where memory or a kernel is missing
            out = isinstance(error, torch.OutOfMemoryError)
            reason = "the device ran out of memory" if out else f"the network did not run ({type(error).__name__})"
            found = _with(found, missing=reason)
    if progress:
        progress(len(parts), len(parts))
    return found


def _with(costs: Costs, **changes: Any) -> Costs:
    return Costs(**(asdict(costs) | changes))


def tiles_of(plan: Plan, shape: Triple) -> int:
    """Return how many tiles the sliding window lays over an image of a shape (I, J, K) at the plan's spacing."""
    i, j, k = map(max, shape, plan.patch)
    tiling = plan.tiling
    window = Window.tiled((i, j, k), plan.patch, tiling) if tiling else Window.over((i, j, k), plan.patch, STEP)
    return window.tiles


def flop(plan: Plan, device: torch.device) -> float:
    """Return the floating-point operations of a patch through the network in use; a multiply-add counts as two.

    Convolutions count as they are defined, however they are computed.
    """
    smaller, ratio = _measurable(plan, device)
    network = placed(build_network(plan.network, plan.inputs, plan.outputs), device).eval()
    image = _image(smaller).to(device)
    tally = _Tally()
    with torch.no_grad(), by_definition(), sdpa_kernel(SDPBackend.MATH), tally:
        network(image)
    return tally.flop * ratio


def step_bytes(plan: Plan, settings: TrainSettings, device: torch.device) -> float:
    """Return the most bytes that tensors hold during a training step of a plan and a recipe, measured on noise.

    On CUDA it is what the device has allocated in real steps. Elsewhere what both passes make is counted on a CPU, on
    patches of at most MEASURED_VOXELS, and grows with voxels and batch; to it come the weights, their mean, gradients
    and what the optimizer remembers.
    Raises torch.OutOfMemoryError where CUDA does not have so much.
    """
    settings = settings.model_copy(update={"compile": False, "growth": 1})  # steps of whole patches
    if device.type == "cuda":
        return _allocated(plan, settings, device)
    cpu = torch.device("cpu")
    smaller, ratio = _measurable(plan, cpu)
    batch = min(settings.batch, MEASURED_BATCH)
    network = placed(build_network(plan.network, plan.inputs, plan.outputs), cpu).train()
    forward = forward_of(network, settings)
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)  # here already, so that they do not seem to grow with the patch
    truth = torch.as_tensor(noise(smaller).target).expand(batch, len(plan.regions) or 1, *smaller.patch)
    tally = _Tally()
    with tally, autocast(settings, cpu):
        logits = forward(_image(smaller).repeat(batch, 1, 1, 1, 1))
        loss = deep_loss(settings.loss, logits, truth, torch.ones(batch, plan.outputs, dtype=torch.bool))
        torch.autograd.backward(loss)
    weights: float = sum(weight.nbytes for weight in network.parameters())
    return weights * (3 + REMEMBERED[settings.optimizer]) + tally.peak * ratio * settings.batch / batch


def _allocated(plan: Plan, settings: TrainSettings, device: torch.device) -> float:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    state = new_state(plan, settings, device)
    sampler = Sampler([noise(plan)], plan, settings.seed, settings.foreground, device)
    for _ in optimize(state, sampler, settings, Budget(steps=2)):  # the second has the state that the first one made
        pass
    return float(torch.cuda.max_memory_allocated(device) - before)


def tile_s(plan: Plan, device: torch.device) -> float:
    """Return the seconds that a patch takes in use on a device, in torch."""
    smaller, ratio = _measurable(plan, device)
    network = placed(build_network(plan.network, plan.inputs, plan.outputs), device).eval()
    runtime = make_runtime(smaller, [network], device=device, runtime="torch")
    image, times = _image(smaller).to(device), []
    for _ in range(1 + TURNS):  # the first one warms up
        began = time.perf_counter()
        float(runtime(image).flatten()[0])  # waits for a GPU
        times.append(time.perf_counter() - began)
    return min(times[1:]) * ratio


def noise(plan: Plan) -> Prepared:
    """Return a prepared case of one patch: noise, and labels at random."""
    random = np.random.default_rng(0)
    image = random.standard_normal((plan.inputs, *plan.patch), np.float32)
    target = random.integers(0, len(values_of(plan.labels, plan.regions)) + 1, plan.patch)
    return Prepared("noise", image, target, {}, np.ones(plan.outputs, bool))


def _image(plan: Plan) -> Tensor:
    return torch.as_tensor(noise(plan).image)[None]


def _measurable(plan: Plan, device: torch.device) -> tuple[Plan, float]:
    """Return the plan with a patch that a device computes in a second, and how many times as many voxels its own has.

    The longest edge is halved while two voxels are left at the coarsest resolution, which normalizations ask for.
    """
    patch, divisor = list(plan.patch), plan.network.divisor
    while device.type == "cpu" and math.prod(patch) > MEASURED_VOXELS:
        able = [edge for edge, by in zip(patch, divisor, strict=True) if edge >= 2 * by]
        if not able or math.prod(patch) < 4 * math.prod(divisor):
            break
        axis = patch.index(max(able))
        patch[axis] = -(-patch[axis] // (2 * divisor[axis])) * divisor[axis]
    i, j, k = patch
    return plan.model_copy(update={"patch": (i, j, k)}), math.prod(plan.patch) / math.prod(patch)


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of what runs inside it, and the most bytes that tensors made inside it hold at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flop = 0.0
        self.peak = self._held = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and to tell the compiler so would load it: seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size
