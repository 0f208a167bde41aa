from __future__ import annotations

import pytest
import torch

from medseg.train.loss import deep_dice_ce

TARGET = torch.zeros(1, 1, 4, 4, 4)
TARGET[..., :2] = 1


def certain(label: float, size: int = 4) -> torch.Tensor:
    """Return logits that are sure of the target (label 1) or of its opposite (label -1)."""
    score = torch.where(TARGET[..., :: 4 // size, :: 4 // size, :: 4 // size] == 1, 50.0, -50.0) * label
    return torch.cat([-score, score], dim=1)


def test_a_sure_and_right_answer_costs_nothing_and_a_wrong_one_dice_plus_cross_entropy():
    assert float(deep_dice_ce([certain(1)], TARGET)) == pytest.approx(0, abs=1e-5)
    assert float(deep_dice_ce([certain(-1)], TARGET)) == pytest.approx(1 + 100, rel=1e-4)


def test_an_output_counts_half_as_much_as_the_finer_one():
    wrong = float(deep_dice_ce([certain(-1)], TARGET))
    assert float(deep_dice_ce([certain(1), certain(-1, size=2)], TARGET)) == pytest.approx(wrong / 3, rel=1e-4)
    assert float(deep_dice_ce([certain(-1), certain(1, size=2)], TARGET)) == pytest.approx(wrong * 2 / 3, rel=1e-4)
