"""Losses where one label is a few voxels in a large background: gradients, signs, and values derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from medseg.train.loss import (
    IGNORED,
    LOSSES,
    REGION_LOSSES,
    WITH_IGNORED,
    boundary,
    cldice,
    deep_loss,
    generalized_dice,
)

ALL = torch.ones(1, 3, dtype=torch.bool)


def phantom(edge: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (1, 3, ...) in double and class numbers: 1 fills a corner, 2 is two voxels."""
    target = torch.zeros(1, 1, edge, edge, edge, dtype=torch.long)
    target[..., :2, :2, :2] = 1
    target[0, 0, edge - 2, edge - 2, 1:3] = 2
    logits = torch.randn(1, 3, edge, edge, edge, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return logits, target


def as_regions(target: torch.Tensor) -> torch.Tensor:
    """Return three regions (1, 3, ...): anything, the large class, the rare one."""
    parts = [(target > 0).long(), (target == 1).long(), (target == 2).long()]
    return torch.where(target == IGNORED, IGNORED, torch.cat(parts, dim=1))


def gradient(loss, logits, target, known):
    logits = logits.clone().requires_grad_()
    loss(logits, target, known).backward()
    return logits.grad


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name, drawn):
    logits, target = phantom()
    known = torch.tensor([[True, drawn, True]])
    target = target if drawn else target.where(target != 1, 0)
    loss = lambda moved: LOSSES[name](moved, target, known)  # noqa: E731 - what gradcheck takes
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_gradients_of_regions_are_those_of_finite_differences(name):
    logits, target = phantom()
    target[..., 0] = IGNORED
    known = torch.tensor([[True, False, True]])
    loss = lambda moved: REGION_LOSSES[name](moved, as_regions(target), known)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),), fast_mode=True)
    slope = gradient(REGION_LOSSES[name], logits.detach(), as_regions(target), known)
    assert (slope[:, 1] == 0).all()  # not drawn
    assert (slope[..., 0] == 0).all()  # ignored
    assert (slope[:, 2][target[:, 0] == 2] < 0).all()


@pytest.mark.parametrize("name", WITH_IGNORED)
def test_ignored_voxels_have_no_gradient(name):
    logits, target = phantom()
    target[..., 0] = IGNORED
    slope = gradient(LOSSES[name], logits, target, ALL)
    assert (slope[..., 0] == 0).all()
    assert (slope[..., 1:] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_moves_probability_between_background_and_what_was_not_drawn(name):
    """Along that direction the sum of both stays the same: their gradients are as their probabilities."""
    logits, target = phantom()
    slope = gradient(LOSSES[name], logits, target.where(target != 1, 0), torch.tensor([[True, False, True]]))
    shares = logits.softmax(dim=1)
    torch.testing.assert_close(slope[:, 0] * shares[:, 1], slope[:, 1] * shares[:, 0])


@pytest.mark.parametrize("name", LOSSES)
def test_a_rare_class_is_pushed_up_in_its_voxels(name):
    """Where the network says background everywhere, as it does early."""
    logits, target = phantom(edge=12)
    logits[:, 0] += 4
    slope = gradient(LOSSES[name], logits, target, ALL)
    rare = target[:, 0] == 2
    assert rare.sum() == 2
    assert (slope[:, 2][rare] < 0).all()
    assert (slope[:, 0][rare] > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_training_lowers_the_loss(name):
    logits, target = phantom(edge=8)
    torch.manual_seed(0)
    network = torch.nn.Conv3d(3, 3, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = deep_loss(name, [network(logits.float())], target, ALL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


def test_generalized_dice_weighs_a_class_by_the_square_of_its_volume():
    target = torch.zeros(1, 1, 10, 1, 1, dtype=torch.long)
    target[0, 0, 0] = 1
    logits = torch.zeros(1, 2, 10, 1, 1)  # each probability is 1/2
    # Common 4.5 and 0.5, sums 5 + 9 and 5 + 1, weights 1/81 and 1: 2 x (4.5 / 81 + 0.5) / (14 / 81 + 6) = 0.18.
    assert float(generalized_dice(logits, target, ALL[:, :2])) == pytest.approx(math.log(2) + 0.82, rel=1e-4)


def test_boundary_weighs_an_error_by_its_squared_distances_to_both_borders():
    target = torch.zeros(1, 1, 5, 1, 1, dtype=torch.long)
    target[0, 0, 0] = 1
    logits = torch.zeros(1, 2, 5, 1, 1)
    logits[0, 1, :, 0, 0] = torch.tensor([50.0, 50, 50, -50, -50])
    # Voxels 1 and 2 are wrong. To the truth, voxel 0, they are 1 and 2 off; to the end of what was found, 2 and 1.
    far = math.log(1 + (1 + 4 + 4 + 1) / 5)
    expected = 2 * 50 / 5 + 1 - 2 * 1 / (3 + 1) + far
    assert float(boundary(logits, target, ALL[:, :2])) == pytest.approx(expected, rel=1e-4)


def test_center_lines_count_a_missed_half_of_a_thin_tube():
    target = torch.zeros(1, 1, 10, 5, 5, dtype=torch.long)
    target[0, 0, 2:8, 2, 2] = 1
    logits = torch.zeros(1, 2, 10, 5, 5)
    logits[0, 1] = -50.0
    logits[0, 1, 2:5, 2, 2] = 50.0
    # A tube one voxel thick is its own line. Of the found line all 3 lie in the truth, of 6 true ones 3 were found;
    # with 1 added to both sides: 4/4 and 4/7, and their Dice is 2 x 4/7 / (11/7) = 8/11.
    expected = 3 * 50 / 250 + 1 - 2 * 3 / (3 + 6) + 1 - 8 / 11
    assert float(cldice(logits, target, ALL[:, :2])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "missing"), [
    ("dice_ce", 1 - 2 * 0.5 / (2 + 1)),
    ("tversky", 1 - 0.5 / (0.3 * 2 + 0.7 * 1)),
    ("focal_tversky", (1 - 0.5 / (0.3 * 2 + 0.7 * 1)) ** 0.75),
])  # fmt: skip
def test_a_region_of_one_voxel_in_four(name, missing):
    target = torch.tensor([1, 0, 0, 0]).view(1, 1, 4, 1, 1)
    logits = torch.zeros(1, 1, 4, 1, 1)  # each probability is 1/2
    found = float(REGION_LOSSES[name](logits, target, torch.ones(1, 1, dtype=torch.bool)))
    assert found == pytest.approx(math.log(2) + missing, rel=1e-4)
