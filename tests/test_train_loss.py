from __future__ import annotations

import math

import pytest
import torch
from monai.losses.dice import DiceCELoss

from medseg.train.loss import (
    IGNORED,
    LOSSES,
    WITH_IGNORED,
    deep_loss,
    dice_ce,
    dice_focal,
    focal_tversky,
    tversky,
    weighted_ce,
)

KNOWN = torch.ones(1, 2, dtype=torch.bool)

TARGET = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
TARGET[..., :2] = 1


def certain(label: float, size: int = 4) -> torch.Tensor:
    """Return logits that are sure of the target (label 1) or of its opposite (label -1)."""
    score = torch.where(TARGET[..., :: 4 // size, :: 4 // size, :: 4 // size] == 1, 50.0, -50.0) * label
    return torch.cat([-score, score], dim=1)


def test_a_sure_and_right_answer_costs_nothing_and_a_wrong_one_dice_plus_cross_entropy():
    assert float(deep_loss("dice_ce", [certain(1)], TARGET, KNOWN)) == pytest.approx(0, abs=1e-5)
    assert float(deep_loss("dice_ce", [certain(-1)], TARGET, KNOWN)) == pytest.approx(1 + 100, rel=1e-4)


def test_an_output_counts_half_as_much_as_the_finer_one():
    wrong = float(deep_loss("dice_ce", [certain(-1)], TARGET, KNOWN))
    for outputs, share in (([certain(1), certain(-1, size=2)], 1 / 3), ([certain(-1), certain(1, size=2)], 2 / 3)):
        assert float(deep_loss("dice_ce", outputs, TARGET, KNOWN)) == pytest.approx(wrong * share, rel=1e-4)


def random_case(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, classes, 5, 6, 4, generator=random)
    return logits, torch.randint(0, classes, (2, 1, 5, 6, 4), generator=random)


def test_where_all_classes_were_drawn_it_is_monais():
    logits, target = random_case()
    monai = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, smooth_nr=1e-5, smooth_dr=1e-5)
    torch.testing.assert_close(dice_ce(logits, target, torch.ones(2, 4, dtype=torch.bool)), monai(logits, target))


def test_a_class_that_is_not_in_a_patch_has_no_dice_there():
    logits, target = random_case()
    target[1][target[1] == 3] = 0
    shares = logits.softmax(dim=1)
    truth = torch.stack([(target[:, 0] == number).float() for number in range(4)], dim=1)
    dice = 2 * (shares * truth).sum(dim=(2, 3, 4)) / (shares + truth).sum(dim=(2, 3, 4))
    there = torch.stack([dice[0, 1], dice[0, 2], dice[0, 3], dice[1, 1], dice[1, 2]])
    entropy = -shares.log().gather(1, target).mean()
    expected = entropy + (1 - there).mean()
    torch.testing.assert_close(dice_ce(logits, target, torch.ones(2, 4, dtype=torch.bool)), expected)


def test_a_patch_of_background_alone_still_teaches():
    logits, target = random_case()
    logits.requires_grad_()
    dice_ce(logits, torch.zeros_like(target), torch.ones(2, 4, dtype=torch.bool)).backward()
    assert (logits.grad[:, 0] < 0).all()  # more background, everywhere


def test_an_undrawn_class_may_be_anywhere_in_the_background():
    logits, target = random_case()
    target[0][target[0] == 2] = 0
    known = torch.tensor([[True, True, False, True], [True] * 4])
    shares = logits.softmax(dim=1)
    shares[0, 0] += shares[0, 2]
    shares[0, 2] = 0
    entropy = -shares.gather(1, target).log().mean()
    truth = torch.stack([(target[:, 0] == number).float() for number in range(4)], dim=1)
    dice = 2 * (shares * truth).sum(dim=(2, 3, 4)) / (shares + truth).sum(dim=(2, 3, 4))
    counted = dice[:, 1:][known[:, 1:]]
    torch.testing.assert_close(dice_ce(logits, target, known), entropy + (1 - counted).mean(), rtol=1e-4, atol=1e-5)


def test_an_undrawn_class_is_pushed_away_from_other_organs_alone():
    logits, target = torch.zeros(1, 3, 2, 1, 1, requires_grad=True), torch.tensor([0, 1]).view(1, 1, 2, 1, 1)
    dice_ce(logits, target, torch.tensor([[True, True, False]])).backward()
    background, organ = logits.grad[0, 2].ravel().tolist()
    assert organ > 0
    assert background == pytest.approx(float(logits.grad[0, 0, 0]))
    assert background < 0  # as welcome there as background itself


def test_an_image_in_which_nothing_was_drawn_teaches_nothing_of_it():
    logits, target = random_case()
    loss = dice_ce(logits.requires_grad_(), target * 0, torch.tensor([[True, False, False, False]] * 2))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_falls_towards_the_truth_and_copes_with_what_was_not_drawn(name):
    logits, target = random_case()
    known = torch.tensor([[True, True, False, True], [True] * 4])
    target[0][target[0] == 2] = 0
    right = 20 * torch.nn.functional.one_hot(target[:, 0], 4).movedim(-1, 1).float() - 10
    logits.requires_grad_()
    loss = deep_loss(name, [logits], target, known)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert float(loss.detach()) > float(deep_loss(name, [right], target, known)) + 0.1
    moved = logits.detach() - 0.1 * logits.grad / logits.grad.abs().max()
    assert float(deep_loss(name, [moved], target, known)) < float(loss.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_changes_where_no_probability_does(name):
    """A softmax is the same when one number is added to all logits of a voxel; so is the order of images."""
    logits, target = random_case()
    known = torch.tensor([[True, True, False, True], [True] * 4])
    target[0][target[0] == 2] = 0
    loss = float(deep_loss(name, [logits], target, known))
    added = 5 * torch.randn(2, 1, 5, 6, 4, generator=torch.Generator().manual_seed(1))
    assert float(deep_loss(name, [logits + added], target, known)) == pytest.approx(loss, rel=1e-4)
    assert float(deep_loss(name, [logits.flip(0)], target.flip(0), known.flip(0))) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_classes_above_background_are_alike_to_every_loss(name):
    logits, target = random_case()
    order = torch.tensor([0, 3, 1, 2])
    known, loss = torch.ones(2, 4, dtype=torch.bool), LOSSES[name]
    renamed = order.argsort()[target]
    torch.testing.assert_close(loss(logits[:, order], renamed, known), loss(logits, target, known))


@pytest.mark.parametrize("name", WITH_IGNORED)
def test_what_is_said_of_ignored_voxels_changes_no_loss(name):
    logits, target = random_case()
    target[:, :, :2] = IGNORED
    known = torch.ones(2, 4, dtype=torch.bool)
    other = logits.clone()
    other[:, :, :2] = torch.randn(2, 4, 2, 6, 4)
    torch.testing.assert_close(LOSSES[name](other, target, known), LOSSES[name](logits, target, known))


def test_focal_loss_weighs_cross_entropy_by_the_square_of_what_is_missing():
    # One voxel of class 1 with probability 3/4, one of background with 3/5; Dice of class 1: 2 * 0.75 / (1.15 + 1).
    logits = torch.tensor([[0.0, math.log(1.5)], [math.log(3), 0.0]])[None, ..., None, None]
    target = torch.tensor([1, 0]).view(1, 1, 2, 1, 1)
    focal = -(0.25**2 * math.log(0.75) + 0.4**2 * math.log(0.6)) / 2
    assert float(dice_focal(logits, target, KNOWN)) == pytest.approx(focal + 1 - 1.5 / 2.15, rel=1e-4)


def test_a_missed_voxel_is_worse_than_a_wrong_one_to_tversky():
    target = torch.zeros(1, 1, 4, 1, 1, dtype=torch.long)
    target[0, 0, :2] = 1
    found = {kind: torch.full((1, 2, 4, 1, 1), 0.0) for kind in ("missed", "wrong")}
    found["missed"][0, 1, :, 0, 0] = torch.tensor([50.0, -50, -50, -50])
    found["wrong"][0, 1, :, 0, 0] = torch.tensor([50.0, 50, 50, -50])
    # One of two found: 1 / (0.3 x 1 + 0.7 x 2); one too many: 2 / (0.3 x 3 + 0.7 x 2). Cross-entropy is 12.5 in both.
    assert float(tversky(found["missed"], target, KNOWN)) == pytest.approx(12.5 + 1 - 1 / 1.7, rel=1e-4)
    assert float(tversky(found["wrong"], target, KNOWN)) == pytest.approx(12.5 + 1 - 2 / 2.3, rel=1e-4)
    assert float(focal_tversky(found["wrong"], target, KNOWN)) == pytest.approx(12.5 + (1 - 2 / 2.3) ** 0.75, rel=1e-4)


def test_a_rare_class_weighs_as_much_as_a_large_one():
    target = torch.zeros(1, 1, 10, 1, 1, dtype=torch.long)
    target[0, 0, 0] = 1
    logits = torch.zeros(1, 2, 10, 1, 1)
    logits[0, 1] = -3.0
    entropy = torch.nn.functional.cross_entropy(logits, target[:, 0], reduction="none")[0, :, 0, 0]
    share = float(torch.sigmoid(torch.tensor(-3.0)))
    dice = 2 * share / (10 * share + 1)
    expected = float(entropy[0] + entropy[1:].mean()) / 2 + 1 - dice
    assert float(weighted_ce(logits, target, KNOWN)) == pytest.approx(expected, rel=1e-4)
