"""Training losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5
"""Added to both sides of the Dice ratio."""

MISSED = 0.7
"""What a missed voxel weighs in the Tversky index; a wrong one weighs the rest."""

IGNORED = -1
"""The class number of voxels that nobody looked at: they count neither in cross-entropy nor in Dice."""

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From logits, target and drawn outputs, as in `deep_loss`, to a number."""

ONE_HOT = {"softmax": True, "to_onehot_y": True}


def deep_loss(name: LossName, logits: Tensor | Sequence[Tensor], target: Tensor, known: Tensor | None) -> Tensor:
    """Return the mean of a loss over the outputs of a U-Net, each weighing half as much as the finer one.

    `logits` are (B, C, ...), the finest first, or those of the one output that a network has; coarser ones are repeated
    to the size of the target. `target` (B, 1, I, J, K) holds class numbers; or it is (B, C, I, J, K), one channel for
    each of C regions that may overlap, 1 inside and 0 outside. It is IGNORED where nobody looked. `known` (B, C) says
    which outputs were drawn in each image; None stands for all. On a GPU nothing waits for a number.
    Raises KeyError for a loss that regions do not have.
    Source: Isensee et al., "nnU-Net", Nature Methods 2021; Lee et al., "Deeply-Supervised Nets", 2015.
    """
    heads = [logits] if isinstance(logits, Tensor) else logits
    weights = [0.5**place for place in range(len(heads))]
    outputs = [functional.interpolate(output.float(), target.shape[2:]) for output in heads]
    loss = (REGION_LOSSES if target.shape[1] == heads[0].shape[1] else LOSSES)[name]
    losses = [weight * loss(output, target, known) for weight, output in zip(weights, outputs, strict=True)]
    return torch.stack(losses).sum() / sum(weights)


def dice_ce(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return cross-entropy + 1 - soft Dice, the Dice of each image and class above 0 in it counting the same.

    A class that is not in a patch has no Dice there, and what is found of it is left to the cross-entropy: most patches
    lack most of many small organs, and a Dice that is 1 for finding nothing would teach just that.
    A class that was not drawn in an image may be anywhere in what is labelled background: its probability is added to
    background's, and it has no Dice. In voxels of another class it stays wrong.
    Source: Shi et al., "Marginal loss and exclusion loss for partially supervised multi-organ segmentation", Medical
    Image Analysis 2021.
    """
    logits = _marginal(logits, known)
    return _entropy(logits, target) + _missing(logits, target, known)


def weighted_ce(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return soft Dice + a cross-entropy to which each class that occurs in the batch adds the same, however small."""
    logits = _marginal(logits, known)
    entropy = functional.cross_entropy(logits, target[:, 0], reduction="none", ignore_index=IGNORED).flatten()
    numbers = target.flatten()
    count = torch.bincount(numbers[numbers >= 0], minlength=logits.shape[1])
    balanced: Tensor = (entropy / count[numbers].clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
    return balanced + _missing(logits, target, known)


def tversky(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return cross-entropy + 1 - the Tversky index, to which a missed voxel is worse than a wrong one, 0.7 to 0.3.

    Source: Salehi et al., "Tversky loss function for image segmentation", MLMI 2017.
    """
    logits = _marginal(logits, known)
    return _entropy(logits, target) + _missing(logits, target, known, MISSED)


def focal_tversky(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return cross-entropy + (1 - the Tversky index) to the power of 3/4, which goes on teaching what is nearly right.

    Source: Abraham and Khan, "A novel focal Tversky loss function", ISBI 2019.
    """
    logits = _marginal(logits, known)
    return _entropy(logits, target) + _missing(logits, target, known, MISSED, 0.75)


def dice_focal(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return 1 - soft Dice + focal loss: cross-entropy times the square of 1 - the true class's probability.

    Source: Lin et al., "Focal loss for dense object detection", ICCV 2017, of a softmax and without its weights.
    """
    logits = _marginal(logits, known)
    entropy = functional.cross_entropy(logits, target[:, 0], reduction="none", ignore_index=IGNORED)
    focal = (1 - torch.exp(-entropy)) ** 2 * entropy  # 0 where a voxel is ignored, as its entropy is
    return _mean_of_counted(focal, target) + _missing(logits, target, known)


def generalized_dice(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return cross-entropy + generalized Dice, MONAI's. Source: Sudre et al., DLMIA 2017."""
    from monai.losses.dice import GeneralizedDiceLoss

    entropy = functional.cross_entropy(_marginal(logits, known), target[:, 0])
    return entropy + _monai(GeneralizedDiceLoss(**ONE_HOT), logits, target, known)


def boundary(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return Dice + cross-entropy + the logarithm of errors weighed by their squared distance to borders, MONAI's.

    Distances are computed on the CPU, which takes longer than a small network does.
    Source: Karimi and Salcudean, "Reducing the Hausdorff distance in medical image segmentation", TMI 2020.
    """
    from monai.losses.hausdorff_loss import LogHausdorffDTLoss

    far = _monai(LogHausdorffDTLoss(**ONE_HOT, include_background=False), logits, target, known)
    return dice_ce(logits, target, known) + far


def cldice(logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """Return Dice + cross-entropy + the soft Dice of center lines, MONAI's, for vessels and other tubes.

    Source: Shit et al., "clDice", CVPR 2021.
    """
    from monai.losses.cldice import SoftclDiceLoss

    lines = _monai(SoftclDiceLoss(**ONE_HOT, include_background=False), logits, target, known)
    return dice_ce(logits, target, known) + lines


LossName = Literal[
    "dice_ce", "dice_focal", "tversky", "focal_tversky", "generalized_dice", "weighted_ce", "boundary", "cldice"
]

LOSSES: dict[LossName, Loss] = {
    "dice_ce": dice_ce,
    "dice_focal": dice_focal,
    "tversky": tversky,
    "focal_tversky": focal_tversky,
    "generalized_dice": generalized_dice,
    "weighted_ce": weighted_ce,
    "boundary": boundary,
    "cldice": cldice,
}
"""From logits (B, C, I, J, K), class numbers (B, 1, I, J, K) and drawn classes (B, C) to a loss."""


def regions_ce(logits: Tensor, target: Tensor, known: Tensor | None, missed: float = 0.5, power: float = 1.0) -> Tensor:
    """Return binary cross-entropy + (1 - the Tversky index) to a power, of regions that may overlap, by sigmoids.

    A region that was not drawn in an image has neither there; one that is not in it has no index. Each counts alike.
    Source: Isensee et al., "nnU-Net for brain tumor segmentation", BrainLes 2020.
    """
    counted = target != IGNORED
    if known is not None:
        counted = counted & known[..., None, None, None]
    truth = (target == 1).to(logits.dtype)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    truth = truth * counted
    missing = _power_mean(_index(logits.sigmoid() * counted, truth, missed), truth, known, power)
    return (entropy * counted).sum() / counted.sum().clamp(min=1) + missing


REGION_LOSSES: dict[LossName, Loss] = {
    "dice_ce": regions_ce,
    "tversky": partial(regions_ce, missed=MISSED),
    "focal_tversky": partial(regions_ce, missed=MISSED, power=0.75),
}
"""From logits (B, C, I, J, K), regions (B, C, I, J, K) and drawn regions (B, C) to a loss."""

WITH_IGNORED: tuple[LossName, ...] = ("dice_ce", "dice_focal", "tversky", "focal_tversky", "weighted_ce")
"""The losses that can leave voxels out; MONAI's look at whole patches."""


WAITING: tuple[LossName, ...] = ("weighted_ce", "generalized_dice", "boundary", "cldice")
"""The losses that may wait for a GPU: those of MONAI, and one that counts."""


def _monai(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    return loss(_marginal(logits, known), target)


def _entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of the voxels that are not ignored, 0 where all are."""
    return _mean_of_counted(
        functional.cross_entropy(logits, target[:, 0], ignore_index=IGNORED, reduction="none"), target
    )


def _mean_of_counted(losses: Tensor, target: Tensor) -> Tensor:
    """Return the mean of losses (B, I, J, K) over the voxels that are not ignored, which have none; 0 where all are."""
    return losses.sum() / (target != IGNORED).sum().clamp(min=1)


def _missing(logits: Tensor, target: Tensor, known: Tensor | None, missed: float = 0.5, power: float = 1.0) -> Tensor:
    """Return the mean of (1 - Tversky index) to a power, of each image and class above 0 that was drawn and is there.

    With `missed` 0.5 the index is Dice. It is 0 where there is none.
    """
    shares = logits.softmax(dim=1)
    truth = functional.one_hot(target[:, 0].clamp(min=0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    counted = target != IGNORED
    if not _surely_all(counted):
        shares, truth = shares * counted, truth * counted
    drawn = None if known is None else known[:, 1:]
    return _power_mean(_index(shares, truth, missed)[:, 1:], truth[:, 1:], drawn, power)


def _power_mean(index: Tensor, truth: Tensor, known: Tensor | None, power: float) -> Tensor:
    """Return the mean of (1 - index) to a power, of what is in `truth` and was drawn; 0 where nothing is."""
    told = truth.flatten(2).any(dim=2)
    if known is not None:
        told = told & known
    missing = (1 - index).clamp(min=SMOOTH) ** power if power != 1 else 1 - index
    return missing.where(told, 0.0).sum() / told.sum().clamp(min=1)


def _index(shares: Tensor, truth: Tensor, missed: float) -> Tensor:
    """Return the Tversky index (B, C) of shares and truth (B, C, I, J, K)."""
    common, found, there = (part.flatten(2).sum(dim=2) for part in (shares * truth, shares, truth))
    return (common + SMOOTH) / ((1 - missed) * found + missed * there + SMOOTH)


def _marginal(logits: Tensor, known: Tensor | None) -> Tensor:
    """Return logits whose softmax has the undrawn classes' probabilities added to background's."""
    if known is None or _surely_all(known):
        return logits
    # Not minus infinity, of which the gradient of a softmax is no number.
    away = torch.finfo(logits.dtype).min / 2
    undrawn = ~known[(..., *[None] * (logits.ndim - 2))]
    background = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(~undrawn[:, 1:], away)], dim=1)
    background = background.logsumexp(dim=1, keepdim=True)
    return torch.cat([background, logits[:, 1:].masked_fill(undrawn[:, 1:], away)], dim=1)


def _surely_all(mask: Tensor) -> bool:
    """Return whether all is true as far as a CPU knows at once; to ask a GPU would be to wait for it."""
    return mask.device.type == "cpu" and bool(mask.all())
