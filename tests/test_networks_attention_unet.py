"""The U-Net with attention gates: what gates of known weights make of the skips."""

from __future__ import annotations

import pytest
import torch
from test_networks_unet import FLAT
from torch import nn

from medseg.networks.attention_gate import AttentionGate
from medseg.networks.build import build_network

GATED = FLAT.model_copy(update={"attention": True})


def both(score: float):
    """Return a plain U-Net, and one of the same weights whose gates have one score everywhere."""
    torch.manual_seed(0)
    plain, gated = build_network(FLAT, 2, 3), build_network(GATED, 2, 3)
    named = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not named.unexpected_keys
    assert all(name.startswith("gates.") for name in named.missing_keys)
    for gate in gated.gates:
        nn.init.zeros_(gate.score.weight)
        nn.init.constant_(gate.score.bias, score)
    return plain, gated, torch.randn(2, 2, 16, 12, 6)


def test_gates_of_one_make_it_the_plain_unet():
    plain, gated, image = both(50.0)
    for own, expected in zip(gated.train()(image), plain.train()(image), strict=True):
        assert torch.equal(own, expected)
    assert torch.equal(gated.eval()(image), plain.eval()(image))


def test_gates_of_zero_remove_the_skips():
    plain, gated, image = both(-1000.0)
    seen = []
    for stage in gated.decoder:
        stage.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    logits = gated.eval()(image)
    for joined in seen:
        assert joined[:, : joined.shape[1] // 2].any()
        assert not joined[:, joined.shape[1] // 2 :].any()
    assert not torch.allclose(logits, plain.eval()(image))


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 1), (2, 2, 2)])
def test_coefficients_lie_between_0_and_1_and_are_those_of_the_coarser_voxels(stride):
    torch.manual_seed(0)
    gate = AttentionGate(4, 6, stride)
    fine = tuple(3 * by for by in stride)
    skip, below = 5 * torch.randn(2, 4, *fine), 5 * torch.randn(2, 6, 3, 3, 3)
    found = gate.coefficients(skip, below)
    assert found.shape == (2, 1, *fine)
    assert bool((found > 0).all())
    assert bool((found < 1).all())
    assert found.max() - found.min() > 0.2
    torch.testing.assert_close(gate(skip, below), skip * found)


def test_a_coefficient_is_that_of_the_paper():
    """By hand: sigmoid(psi relu(theta x + phi g + b) + c), with theta 2 and 0, phi 3, b 1, psi 1/2 and c -4."""
    gate = AttentionGate(2, 1, (1, 1, 1))
    with torch.no_grad():
        gate.from_skip.weight.copy_(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1, 1))
        gate.from_below.weight.fill_(3.0)
        gate.from_below.bias.fill_(1.0)
        gate.score.weight.fill_(0.5)
        gate.score.bias.fill_(-4.0)
    skip = torch.tensor([1.0, 7.0]).view(1, 2, 1, 1, 1)
    below = torch.full((1, 1, 1, 1, 1), 2.0)
    expected = 1 / (1 + torch.tensor(4.0 - 0.5 * (2 * 1 + 3 * 2 + 1)).exp())
    torch.testing.assert_close(gate.coefficients(skip, below).flatten()[0], expected)
