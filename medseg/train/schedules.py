"""Optimizers, and how fast they learn when so much of the budget is spent."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from medseg.train.muon import Muon
from medseg.train.settings import TrainSettings

RISE, FIRST, LAST, MOMENTA = 0.3, 1 / 25, 1 / 250_000, (0.85, 0.95)
"""One-cycle: share of the budget in which the rate rises, where it begins and ends, and how momentum runs against it.

Source: Smith and Topin, "Super-convergence", 2019; the numbers are torch's.
"""

POWER = 0.9
"""Of the polynomial that the rate falls by, as in nnU-Net."""


def make_optimizer(network: nn.Module, settings: TrainSettings) -> Optimizer:
    """Return the optimizer of a recipe: Muon, AdamW, or gradient descent with Nesterov's momentum.

    On CUDA learning rates lie in tensors, so that recorded steps follow them.
    """
    device = next(network.parameters()).device
    on_cuda = device.type == "cuda"
    optimizer = _optimizer(network, settings, fused=on_cuda)
    for group in optimizer.param_groups if on_cuda else ():
        group["lr"] = torch.tensor(settings.learning_rate, device=device)
    return optimizer


def _optimizer(network: nn.Module, settings: TrainSettings, *, fused: bool) -> Optimizer:
    if settings.optimizer == "muon":
        return Muon(network, settings.learning_rate, settings.weight_decay)
    weights, rate, decay = network.parameters(), settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        nesterov = momentum > 0
        return torch.optim.SGD(
            weights, rate, momentum, weight_decay=decay, nesterov=nesterov, foreach=not fused, fused=fused
        )
    return torch.optim.AdamW(weights, rate, weight_decay=decay, foreach=not fused, fused=fused, capturable=fused)


def set_rates(optimizer: Optimizer, settings: TrainSettings, done: float) -> None:
    """Set learning rate, and with one-cycle the momentum, to what they are when `done` of the budget is spent."""
    for group in optimizer.param_groups:
        rate = settings.learning_rate * share_of_rate(settings, done)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if settings.schedule == "one_cycle":
            low, high = MOMENTA
            momentum = high - (high - low) * _cycle(done, 0.0, 0.0)
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum


def share_of_rate(settings: TrainSettings, done: float) -> float:
    """Return the learning rate as a share of its highest when `done` of the budget is spent."""
    if settings.schedule == "poly":
        return float((1 - min(done, 1.0)) ** POWER)
    if settings.schedule == "one_cycle":
        return _cycle(done, FIRST, LAST)
    return schedule(done, settings.warmup)


def schedule(done: float, warmup: float) -> float:
    """Return the learning rate as a share of its highest when `done` of the budget is spent: rise, then cosine."""
    if done < warmup:
        return max(done, 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _cycle(done: float, first: float, last: float) -> float:
    """Return what rises by a cosine from `first` to 1, and falls by one to `last`."""
    if done < RISE:
        return 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * done / RISE))
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - RISE) / (1 - RISE))))
