"""The training loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5
"""Added to both sides of the Dice ratio: 1 where a class is neither there nor found."""


def deep_dice_ce(logits: Sequence[Tensor], target: Tensor, known: Tensor) -> Tensor:
    """Return the mean of `dice_ce` over the outputs of a U-Net, each weighing half as much as the finer one.

    `logits` are (B, C, ...), the finest first; coarser ones are repeated to the size of the target.
    Source: Isensee et al., "nnU-Net", Nature Methods 2021; Lee et al., "Deeply-Supervised Nets", 2015.
    """
    weights = [0.5**place for place in range(len(logits))]
    outputs = [functional.interpolate(output.float(), target.shape[2:]) for output in logits]
    losses = [weight * dice_ce(output, target, known) for weight, output in zip(weights, outputs, strict=True)]
    return torch.stack(losses).sum() / sum(weights)


def dice_ce(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Return cross-entropy + 1 - soft Dice, the Dice of each image and class above 0 counting the same.

    `logits` are (B, C, I, J, K), `target` (B, 1, I, J, K) holds channel numbers, `known` (B, C) says which classes were
    drawn in each image. One that was not may be anywhere in what is labelled background: its probability is added to
    background's, and it has no Dice. In voxels of another class it stays wrong.
    Source: Shi et al., "Marginal loss and exclusion loss for partially supervised multi-organ segmentation", Medical
    Image Analysis 2021.
    """
    if not known.all():
        logits = _marginal(logits, known)
    logarithms = logits.log_softmax(dim=1)
    entropy = functional.nll_loss(logarithms, target[:, 0])
    truth = functional.one_hot(target[:, 0], logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    shares = logarithms.exp()
    common = (shares * truth).flatten(2).sum(dim=2)
    both = shares.flatten(2).sum(dim=2) + truth.flatten(2).sum(dim=2)
    dice = ((2 * common + SMOOTH) / (both + SMOOTH))[:, 1:]
    drawn = known[:, 1:]
    return entropy + (1 - dice[drawn]).sum() / drawn.sum().clamp(min=1)


def _marginal(logits: Tensor, known: Tensor) -> Tensor:
    """Return logits whose softmax has the undrawn classes' probabilities added to background's."""
    # Not minus infinity, of which the gradient of a softmax is no number.
    away = torch.finfo(logits.dtype).min / 2
    undrawn = ~known[(..., *[None] * (logits.ndim - 2))]
    background = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(~undrawn[:, 1:], away)], dim=1)
    background = background.logsumexp(dim=1, keepdim=True)
    return torch.cat([background, logits[:, 1:].masked_fill(undrawn[:, 1:], away)], dim=1)
