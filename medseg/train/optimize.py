"""The optimization: from batches to better weights, one step after the other."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import PathLike

import torch
from torch import nn
from torch.optim import Optimizer

from medseg.errors import ModelError
from medseg.model.networks import build_network, memory_format, placed
from medseg.model.plan import Plan
from medseg.model.weights import begin_with
from medseg.train.augment import change_intensities
from medseg.train.checkpoint import TrainState
from medseg.train.loss import deep_loss
from medseg.train.muon import Muon
from medseg.train.ranks import Ranks
from medseg.train.sampler import Batch, Sampler
from medseg.train.settings import Budget, TrainSettings

ALONE = Ranks()


def new_state(
    plan: Plan, settings: TrainSettings, device: torch.device, start: str | PathLike[str] | None = None
) -> TrainState:
    """Return a network with its running average and optimizer: random from the seed, or with the weights of a model.

    Raises ModelError where that model's network is another one, or none of medseg's own.
    """
    torch.manual_seed(settings.seed)
    network = build_network(plan.unet, len(plan.channels), plan.outputs)
    if start is not None:
        begin_with(network, start)
    network = placed(network, device).train()
    return TrainState(network, copy.deepcopy(network), make_optimizer(network, settings))


def make_optimizer(network: nn.Module, settings: TrainSettings) -> Optimizer:
    """Return the optimizer of a recipe."""
    if settings.optimizer == "muon":
        return Muon(network, settings.learning_rate, settings.weight_decay)
    return torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True
    )


def optimize(
    state: TrainState, sampler: Sampler, settings: TrainSettings, budget: Budget, ranks: Ranks = ALONE
) -> Iterator[float]:
    """Yield the loss of each step until the budget is spent; `state` is updated in place before each yield.

    Each of several `ranks` draws a batch of its own: together they take the steps of one with so many times the batch.
    Time between the steps counts, so that a time budget is one of wall clock while the training runs.
    Raises ModelError where the loss is no longer a number.
    """
    clock = time.monotonic()
    samples = range(ranks.rank * settings.batch, (ranks.rank + 1) * settings.batch)
    for batch in _batches(sampler, samples, state):
        done = ranks.agreed(budget.spent(state.step, state.seconds))
        if done >= 1:
            return
        for group in state.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(done, settings.warmup)
        loss = _step(state, settings, batch, ranks)
        state.step += 1
        state.seconds += time.monotonic() - clock
        clock = time.monotonic()
        yield loss


def schedule(done: float, warmup: float) -> float:
    """Return the learning rate as a share of its highest when `done` of the budget is spent: rise, then cosine."""
    if done < warmup:
        return max(done, 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _step(state: TrainState, settings: TrainSettings, batch: Batch, ranks: Ranks) -> float:
    device = next(state.network.parameters()).device
    images = change_intensities(batch.images.to(device, memory_format=memory_format(device)), batch.seeds)
    loss = deep_loss(settings.loss, state.network(images), batch.target.to(device), batch.known.to(device))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ModelError(
            f"The training diverged: the loss is {value} at step {state.step}. Try a lower learning rate.",
            reason="diverged",
        )
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    ranks.average_gradients(state.network.parameters())
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), settings.gradient_norm)
    state.optimizer.step()
    decay = min(settings.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        for mean, weight in zip(state.average.parameters(), state.network.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
    return value


def _batches(sampler: Sampler, samples: range, state: TrainState) -> Iterator[Batch]:
    """Yield the batches from the state's step on; for a GPU, each is drawn while the one before is trained on."""
    if next(state.network.parameters()).device.type == "cpu":
        while True:  # a second thread would only take cores from the network
            yield sampler.batch(state.step, samples)
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(sampler.batch, state.step, samples)
        for step in itertools.count(state.step + 1):
            batch = drawn.result()
            drawn = pool.submit(sampler.batch, step, samples)
            yield batch
