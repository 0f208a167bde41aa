"""The training loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor
from torch.nn import functional

_dice_ce = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, smooth_nr=1e-5, smooth_dr=1e-5)


def deep_dice_ce(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Return the mean of Dice + cross-entropy over the outputs of a U-Net, each weighing half as much as the finer one.

    `logits` are (B, C, ...), the finest first; coarser ones are repeated to its size. `target` (B, 1, I, J, K) holds
    channel numbers. Source: Isensee et al., "nnU-Net", Nature Methods 2021; Lee et al., "Deeply-Supervised Nets", 2015.
    """
    weights = [0.5**place for place in range(len(logits))]
    outputs = [functional.interpolate(output.float(), target.shape[2:]) for output in logits]
    losses = [weight * _dice_ce(output, target) for weight, output in zip(weights, outputs, strict=True)]
    return torch.stack(losses).sum() / sum(weights)
