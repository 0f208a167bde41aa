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

from medseg.errors import ModelError
from medseg.model.networks import build_network, memory_format, placed
from medseg.model.plan import Plan
from medseg.model.weights import begin_with
from medseg.train.augment import change_intensities
from medseg.train.checkpoint import FINISH, TrainState
from medseg.train.loss import deep_loss
from medseg.train.options import autocast, forward_of, scaler_of, seed_dropout, told_if_not_compiled
from medseg.train.ranks import Ranks
from medseg.train.sampler import Batch, Sampler
from medseg.train.schedules import make_optimizer, set_rates
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
    average = copy.deepcopy(network)  # before options change how the network runs
    optimizer, scaler = make_optimizer(network, settings), scaler_of(settings, device)
    return TrainState(network, average, optimizer, forward_of(network, settings), scaler)


def optimize(
    state: TrainState, sampler: Sampler, settings: TrainSettings, budget: Budget, ranks: Ranks = ALONE
) -> Iterator[float]:
    """Yield the loss of each step until the budget is spent; `state` is updated in place before each yield.

    Each of several `ranks` draws a batch of its own: together they take the steps of one with so many times the batch.
    Time between the steps counts, so that a time budget is one of wall clock while the training runs.
    It ends before that where `state.asked` says so in the first process, and then says it in all.
    Raises ModelError where the loss is no longer a number.
    """
    clock = time.monotonic()
    drawn = settings.batch * settings.accumulate
    samples = range(ranks.rank * drawn, (ranks.rank + 1) * drawn)
    for batch in _batches(sampler, samples, state):
        done = ranks.agreed(state.asked or min(1.0, budget.spent(state.step, state.seconds)))
        if done >= FINISH:
            state.asked = done
            return
        set_rates(state.optimizer, settings, done)
        loss = _step(state, settings, batch, ranks)
        state.step += 1
        state.seconds += time.monotonic() - clock
        clock = time.monotonic()
        yield loss


def _step(state: TrainState, settings: TrainSettings, batch: Batch, ranks: Ranks) -> float:
    seed_dropout(settings, state.step, ranks.rank)
    state.optimizer.zero_grad(set_to_none=True)
    parts = zip(*(torch.split(part, settings.batch) for part in batch), strict=True)
    value = sum(_gradients(state, settings, Batch(*part)) for part in parts)
    if not math.isfinite(value):
        raise ModelError(
            f"The training diverged: the loss is {value} at step {state.step}. Try a lower learning rate.",
            reason="diverged",
        )
    ranks.average_gradients(state.network.parameters())
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), settings.gradient_norm)
    if state.scaler:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.step()
    decay = min(settings.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        for mean, weight in zip(state.average.parameters(), state.network.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
    return value


def _gradients(state: TrainState, settings: TrainSettings, batch: Batch) -> float:
    """Add the gradients of one batch to those of a step; return its part of the loss."""
    device = next(state.network.parameters()).device
    images = change_intensities(batch.images.to(device, memory_format=memory_format(device)), batch.seeds)
    forward = state.network if state.forward is None else state.forward  # a compiled module has no truth value
    with told_if_not_compiled(settings):
        with autocast(settings, device):
            logits = forward(images)
        loss = deep_loss(settings.loss, logits, batch.target.to(device), batch.known.to(device)) / settings.accumulate
        torch.autograd.backward(state.scaler.scale(loss) if state.scaler else loss)
    return float(loss.detach())


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
