"""The U-Net: its shapes, what it returns in training, and that its parts are what they are said to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.networks.build import build_network
from medseg.networks.kinds import Network
from medseg.networks.layers import Convolution, upsampling

FLAT = Network(
    features=(4, 6, 6),
    kernels=((3, 3, 1), (3, 3, 1), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 1), (2, 2, 2)),
    blocks=(1, 3, 2),
    decoder_blocks=(2, 1),
    heads=1,
)
SIMPLER = {"downsampling": "pooled", "upsampling": "interpolated"}
KINDS = {
    "plain": FLAT,
    "residual": FLAT.model_copy(update={"residual": True}),
    "pooled": FLAT.model_copy(update=SIMPLER),
    "pooled residual": FLAT.model_copy(update=SIMPLER | {"residual": True}),
}

each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_logits_have_the_size_of_the_image_and_in_training_those_of_the_heads_too(kind):
    network = build_network(KINDS[kind], 2, 3)
    image = torch.randn(2, 2, 16, 12, 6)
    finest, coarser = network.train()(image)
    assert finest.shape == (2, 3, 16, 12, 6)
    assert coarser.shape == (2, 3, 8, 6, 6)
    torch.testing.assert_close(network.eval()(image), finest)


@each_kind
def test_every_weight_of_the_finest_output_learns(kind):
    network = build_network(KINDS[kind], 1, 2).eval()
    network.apply(lambda module: nn.init.ones_(module.weight) if isinstance(module, nn.GroupNorm) else None)
    network(torch.randn(1, 1, 8, 8, 4)).square().sum().backward()
    idle = {name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert idle == {"outputs.1.weight", "outputs.1.bias"}


@each_kind
def test_blocks_are_as_many_as_the_plan_says(kind):
    network = build_network(KINDS[kind], 1, 2)
    assert [len(stage) for stage in network.encoder] == [1, 3, 2]
    assert [len(stage) for stage in network.decoder] == [2, 1]
    assert [up.scale if "pooled" in kind else up.kernel_size for up in network.up] == [(2, 2, 2), (2, 2, 1)]
    assert network.decoder[1][0].conv.kernel_size == (3, 3, 1)  # that of its own resolution, not of the one below


def test_a_new_residual_block_is_its_skip():
    network = build_network(KINDS["residual"], 1, 2)
    same = network.encoder[1][1]
    image = torch.rand(1, 6, 8, 8, 4)
    torch.testing.assert_close(same(image), image)
    strided = network.encoder[2][0]
    torch.testing.assert_close(strided(image), nn.AvgPool3d(2)(image))


def test_pooling_takes_the_largest_and_interpolation_what_lies_between():
    network = build_network(KINDS["pooled"], 1, 2).eval()
    seen = []
    network.encoder[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    image = torch.randn(1, 1, 8, 8, 4)
    network(image)
    fine = network.encoder[0](image)
    torch.testing.assert_close(seen[0], fine.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)))
    assert all(conv.stride == (1, 1, 1) for conv in network.modules() if isinstance(conv, nn.Conv3d))
    up = upsampling(1, 1, (2, 1, 1), interpolated=True)
    nn.init.constant_(up.weight, 3.0)
    nn.init.constant_(up.bias, 1.0)
    expected = torch.tensor([1.0, 1.75, 3.25, 4.0])  # of 0 and 1, three times and one more, at -1/4, 1/4, 3/4, 5/4
    torch.testing.assert_close(up(torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)).flatten(), expected)


def test_groups_of_one_channel_are_instance_normalization():
    block = build_network(FLAT, 1, 2).encoder[0][0]
    image = torch.randn(2, 1, 8, 8, 4)
    expected = nn.functional.leaky_relu(nn.functional.instance_norm(block.conv(image)), 0.01)
    torch.testing.assert_close(block(image), expected)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_the_fast_normalization_has_torchs_values_and_gradients(layout):
    """Of single channels with a leaky ReLU behind: medseg's own backward pass against torch's."""
    torch.manual_seed(3)
    block = Convolution(3, 5, (3, 3, 3)).train()
    torch.nn.init.normal_(block.norm.weight)
    torch.nn.init.normal_(block.norm.bias)
    image = (2 + 3 * torch.randn(2, 3, 6, 7, 5)).to(memory_format=layout).requires_grad_()
    gradient = torch.randn(2, 5, 6, 7, 5)
    own, other = block(image), block.active(block.norm(block.conv(image)))
    assert torch.equal(own, other)
    wanted = [image, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad(own, wanted, gradient), torch.autograd.grad(other, wanted, gradient), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
