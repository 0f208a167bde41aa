from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.train.muon import QUINTIC, Muon, orthogonal
from medseg.train.schedules import set_rates
from medseg.train.settings import TrainSettings


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
def test_an_orthogonal_matrix_keeps_the_singular_vectors_and_evens_the_values(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64) * torch.linspace(0.5, 2, shape[0], dtype=torch.float64)[:, None]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert values.max() / values.min() > 1.9
    evened = left.mT @ orthogonal(matrix) @ right.mT
    assert evened.diagonal().min() > 0.6
    assert evened.diagonal().max() < 1.3
    torch.testing.assert_close(evened, torch.diag(evened.diagonal()), atol=1e-6, rtol=0)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, bias=False)
        self.norm = nn.GroupNorm(4, 4)
        self.outputs = nn.Conv3d(4, 3, 1)


def test_norms_biases_and_outputs_step_as_in_adamw():
    network, twin = Small(), Small()
    twin.load_state_dict(network.state_dict())
    own = Muon(network, 0.01, 0.1)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(step)
        for a, b in zip(network.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        own.step()
        adamw.step()
    for (name, a), b in zip(network.named_parameters(), twin.parameters(), strict=True):
        if name == "conv.weight":
            assert not torch.allclose(a, b)
        else:
            torch.testing.assert_close(a, b)


def test_one_cycle_runs_the_momentum_of_convolutions_against_the_rate():
    steps = []
    for done in (0.0, 0.3):
        torch.manual_seed(0)
        network = Small()
        optimizer = Muon(network, 0.01, 0.0)
        set_rates(optimizer, TrainSettings(schedule="one_cycle"), done)
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95 if done == 0 else 0.85)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for sign in (1, -1):  # a second gradient the other way: what is left of the first one depends on the momentum
            for weight in network.parameters():
                weight.grad = torch.full_like(weight, sign) + torch.randn_like(weight)
            optimizer.step()
        steps.append(network.state_dict())
    assert any(not torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


def test_the_step_of_a_convolution_does_not_depend_on_the_size_of_its_gradient():
    changes = []
    for size in (1e-3, 1e3):
        torch.manual_seed(0)
        network = Small()
        before = network.conv.weight.detach().clone()
        network.conv.weight.grad = size * torch.randn(network.conv.weight.shape)
        Muon(network, 0.01, 0.0).step()
        changes.append(before - network.conv.weight.detach())
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-3, atol=1e-6)
    assert 0.1 < changes[0].square().mean().sqrt() / 0.01 < 0.4  # about AdamW's


@pytest.mark.parametrize("shape", [(16, 27), (32, 432), (64, 8)])
def test_turns_among_small_matrices_give_what_turns_of_the_whole_matrix_give(shape):
    torch.manual_seed(2)
    matrix = torch.randn(shape) * torch.logspace(0, -4, shape[1])  # some directions hardly matter
    a, b, c = QUINTIC
    tall = shape[0] > shape[1]
    expected = (matrix.mT if tall else matrix).double()
    expected = expected / expected.norm()
    for _ in range(5):
        square = expected @ expected.mT
        expected = a * expected + (b * square + c * square @ square) @ expected
    found = orthogonal(matrix).double()
    assert (found - (expected.mT if tall else expected)).norm() / expected.norm() < 1e-3


class Transformer(nn.Module):
    """Every kind of weight that a transformer has."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.tokens = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.expand = nn.Linear(8, 16)
        self.depth_wise = nn.Conv3d(16, 16, 3, groups=16)
        self.outputs = nn.Linear(16, 3)


def changes_after_a_step() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return by name what one step of Muon changes, and one of AdamW, both with a learning rate of 1."""
    torch.manual_seed(0)
    network, twin = Transformer(), Transformer()
    twin.load_state_dict(network.state_dict())
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    Muon(network, 1.0, 0.0).step()
    torch.optim.AdamW(twin.parameters(), lr=1.0, weight_decay=0.0).step()
    muon, adamw = (
        {name: before[name] - weight.detach() for name, weight in one.named_parameters()} for one in (network, twin)
    )
    return muon, adamw


def test_of_a_transformer_the_linear_layers_are_matrices_and_the_rest_steps_as_in_adamw():
    muon, adamw = changes_after_a_step()
    alike = {name for name in muon if torch.allclose(muon[name], adamw[name], rtol=1e-4, atol=1e-5)}
    assert set(muon) - alike == {"qkv.weight", "expand.weight"}


def test_query_key_and_value_of_one_layer_are_three_matrices():
    """As one matrix, the value, whose gradient is much the largest, would take the whole step."""
    torch.manual_seed(0)
    network = Transformer()
    before = network.qkv.weight.detach().clone()
    network.qkv.weight.grad = torch.randn(24, 8) * torch.tensor([1e-3, 1e-2, 10.0]).repeat_interleave(8)[:, None]
    Muon(network, 1.0, 0.0).step()
    for part in (before - network.qkv.weight.detach()).split(8):
        values = torch.linalg.svdvals(part) / (0.2 * 8**0.5)
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3


def test_steps_of_a_unet_are_those_of_all_its_convolutions():
    network = Small()
    hidden, rest = Muon(network, 0.01, 0.0).param_groups
    assert [id(weight) for weight in hidden["params"]] == [id(network.conv.weight)]
    assert len(rest["params"]) == 4
