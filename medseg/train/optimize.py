"""The optimization: from batches to better weights, one step after the other."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from medseg.errors import ModelError
from medseg.model.plan import Plan
from medseg.model.weights import begin_with
from medseg.networks.build import build_network, placed
from medseg.networks.kinds import Triple
from medseg.train.checkpoint import FINISH, TrainState
from medseg.train.feed import batches
from medseg.train.growth import growing_patches, patch_of
from medseg.train.loss import deep_loss
from medseg.train.options import autocast, computing, forward_of, freeze, scaler_of, seed_dropout, told_if_not_compiled
from medseg.train.ranks import Ranks
from medseg.train.record import Recorded, can_record
from medseg.train.sampler import Batch, Sampler
from medseg.train.schedules import make_optimizer, set_rates
from medseg.train.settings import Budget, TrainSettings

ALONE = Ranks()

READ_STEPS = 25
"""Of a GPU, between two looks at the losses: half of what a line of the history sums up."""


def new_state(plan: Plan, settings: TrainSettings, device: torch.device, start: Path | None = None) -> TrainState:
    """Return a network with its running average and optimizer: random from the seed, or with the weights `start`.

    Raises ModelError where that model's network is another one.
    """
    torch.manual_seed(settings.seed)
    network = build_network(plan.network, plan.inputs, plan.outputs)
    if start is not None:
        anew = begin_with(network, plan, start)
        freeze(network, settings, anew)
    network = placed(network, device).train()
    average = copy.deepcopy(network)  # before options change how the network runs
    optimizer, scaler = make_optimizer(network, settings), scaler_of(settings, device)
    return TrainState(network, average, optimizer, forward_of(network, settings), scaler)


def optimize(
    state: TrainState, sampler: Sampler, settings: TrainSettings, budget: Budget, ranks: Ranks = ALONE
) -> Iterator[list[float]]:
    """Yield after each step the losses that have been read since; `state` is updated in place before each yield.

    On a CPU it is the loss of that step. Reading from a GPU waits for it: there every READ_STEPS steps give theirs
    together, and the last ones at the end.
    Each of several `ranks` draws a batch of its own: together they take the steps of one with so many times the batch.
    Time between the steps counts, so that a time budget is one of wall clock while the training runs.
    It ends before that where `state.asked` says so in the first process, and then says it in all.
    Raises ModelError where a loss is no longer a number.
    """
    clock = time.monotonic()
    drawn = settings.batch * settings.accumulate
    samples = range(ranks.rank * drawn, (ranks.rank + 1) * drawn)
    every = 1 if sampler.device.type == "cpu" else READ_STEPS
    unread: list[Tensor] = []
    step: Callable[[Batch], Tensor] = partial(_changed, state, settings, ranks)
    if can_record(state, settings) and ranks.size == 1:
        step = Recorded(step)
    patches = growing_patches(sampler.plan.patch, sampler.plan.network.divisor, settings.growth)
    sized = partial(_patch_at, patches, budget, state)
    for batch in batches(sampler, samples, state.step, sized):
        done = ranks.agreed(state.asked or min(1.0, budget.spent(state.step, state.seconds)))
        if done >= FINISH:
            state.asked = done
            break
        set_rates(state.optimizer, settings, done)
        seed_dropout(settings, state.step, ranks.rank)
        unread.append(step(batch))
        _follow(state, settings)
        state.step += 1
        losses = _read(unread, state.step) if state.step % every == 0 else []
        state.seconds += time.monotonic() - clock
        clock = time.monotonic()
        yield losses
    if unread:
        yield _read(unread, state.step)


def _patch_at(patches: tuple[Triple, ...], budget: Budget, state: TrainState, step: int) -> Triple:
    """Return the patch of a step; with a budget in time, that of now."""
    return patch_of(patches, budget.spent(step, state.seconds))


def _read(unread: list[Tensor], step: int) -> list[float]:
    """Return the losses of the steps up to `step` that have not been read, and forget them."""
    losses: list[float] = torch.stack(unread).tolist()
    unread.clear()
    for place, loss in enumerate(losses, start=step - len(losses)):
        if not math.isfinite(loss):
            raise ModelError(
                f"The training diverged: the loss is {loss} at step {place}. Try a lower learning rate.",
                reason="diverged",
            )
    return losses


def _changed(state: TrainState, settings: TrainSettings, ranks: Ranks, batch: Batch) -> Tensor:
    """Change the weights by one step, and return its loss. Nothing here waits for a GPU, but for float16."""
    state.optimizer.zero_grad(set_to_none=True)
    loss = torch.stack([_gradients(state, settings, part) for part in batch.split(settings.batch)]).sum()
    ranks.average_gradients(state.network.parameters())
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), settings.gradient_norm)
    if state.scaler:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.step()
    return loss


def _follow(state: TrainState, settings: TrainSettings) -> None:
    """Let the running mean of the weights follow them by a step; running statistics of images are means already."""
    decay = min(settings.ema, (1 + state.step) / (10 + state.step))
    means: list[Tensor] = list(state.average.parameters())
    weights: list[Tensor] = list(state.network.parameters())
    with torch.no_grad():
        torch._foreach_lerp_(means, weights, 1 - decay)
        for kept, seen in zip(state.average.buffers(), state.network.buffers(), strict=True):
            kept.copy_(seen)


def _gradients(state: TrainState, settings: TrainSettings, batch: Batch) -> Tensor:
    """Add the gradients of one batch to those of a step; return its part of the loss."""
    forward = state.network if state.forward is None else state.forward  # a compiled module has no truth value
    with told_if_not_compiled(settings), computing(settings, batch.images.device):
        with autocast(settings, batch.images.device):
            logits = forward(batch.images)
        loss = deep_loss(settings.loss, logits, batch.target, batch.known) / settings.accumulate
        torch.autograd.backward(state.scaler.scale(loss) if state.scaler else loss)
    return loss.detach()
