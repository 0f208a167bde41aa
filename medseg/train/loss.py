"""The training loss."""

from __future__ import annotations

import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor

_dice_ce = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, smooth_nr=1e-5, smooth_dr=1e-5)


def deep_dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean of Dice + cross-entropy over the outputs of a U-Net, each weighing half as much as the finer one.

    `logits` is (B, C, I, J, K), or (B, H, C, I, J, K) with the finest of H outputs first; `target` (B, 1, I, J, K)
    holds channel numbers. Source: Isensee et al., "nnU-Net", Nature Methods 2021; Lee et al., "Deeply-Supervised
    Nets", 2015.
    """
    outputs = logits.unbind(dim=1) if logits.ndim == 6 else (logits,)
    weights = [0.5**place for place in range(len(outputs))]
    losses = [weight * _dice_ce(output.float(), target) for weight, output in zip(weights, outputs, strict=True)]
    return torch.stack(losses).sum() / sum(weights)
