"""Winograd's convolution against torch's: values, gradients, exactness, and when a network takes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from medseg.networks import layers, winograd
from medseg.networks.build import build_network
from medseg.networks.kinds import Network

CUBES = ((3, 3, 3), (3, 3, 3))


def both(image: Tensor, kernels: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (medseg's, torch's) values, gradients of the image and gradients of the kernels."""
    pairs = []
    for convolution in (winograd.convolve, lambda image, kernels: functional.conv3d(image, kernels, padding=1)):
        inputs = image.clone().requires_grad_(), kernels.clone().requires_grad_()
        values = convolution(*inputs)
        pairs.append((values.detach(), *torch.autograd.grad(values, inputs, gradient)))
    return list(zip(*pairs, strict=True))


@given(
    size=st.tuples(st.integers(1, 14), st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    slab=st.integers(1, 600),
    piece=st.integers(3, 200),
    layout=st.sampled_from([torch.channels_last_3d, torch.contiguous_format]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_torch(size, batch, channels, slab, piece, layout, seed):
    """In double precision, for all sizes, and however an image falls into slabs and pieces."""
    torch.manual_seed(seed)
    image = torch.randn(batch, channels[0], *size, dtype=torch.float64).to(memory_format=layout)
    kernels = torch.randn(channels[1], channels[0], 3, 3, 3, dtype=torch.float64)
    gradient = torch.randn(batch, channels[1], *size, dtype=torch.float64).to(memory_format=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "SLAB", slab)
        patch.setattr(winograd, "PIECE", piece)
        for own, other in both(image, kernels, gradient):
            torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


def test_a_single_voxel_becomes_the_kernel_turned_round():
    kernels = torch.arange(27.0).view(1, 1, 3, 3, 3)
    image = torch.zeros(1, 1, 7, 5, 5)
    image[0, 0, 4, 2, 3] = 1
    expected = torch.zeros(1, 1, 7, 5, 5)
    expected[0, 0, 3:6, 1:4, 2:5] = kernels[0, 0].flip(0, 1, 2)
    torch.testing.assert_close(winograd.convolve(image, kernels), expected, rtol=0, atol=1e-5)


def test_single_precision_is_nearly_as_exact_as_torchs():
    torch.manual_seed(1)
    image, kernels = torch.randn(2, 48, 12, 20, 16), torch.randn(40, 48, 3, 3, 3)
    gradient = torch.randn(2, 40, 12, 20, 16)
    exact = [other for _, other in both(image.double(), kernels.double(), gradient.double())]
    for pair, right in zip(both(image, kernels, gradient), exact, strict=True):
        own, other = ((values.double() - right).norm() / right.norm() for values in pair)
        assert own < 4e-6
        assert own < 10 * other


def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch):
    image, kernels = torch.randn(1, 2, 4, 5, 6), torch.randn(3, 2, 3, 3, 3)
    monkeypatch.setattr(winograd, "_gradient_of_kernels", None)  # to call it is an error
    seen = image.clone().requires_grad_()
    winograd.convolve(seen, kernels).sum().backward()
    assert seen.grad.shape == image.shape
    monkeypatch.undo()
    learned = kernels.clone().requires_grad_()
    values = winograd.convolve(image, learned)
    monkeypatch.setattr(winograd, "_convolved", None)
    values.sum().backward()
    assert learned.grad.shape == kernels.shape


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [
        ((32, 32), (40, 56, 40), True),
        ((64, 32), (8, 40, 40), True),
        ((16, 64), (40, 56, 40), False),  # narrow: the passage through the points costs as much as it saves
        ((256, 256), (4, 6, 6), False),  # small
        ((320, 320), (5, 20, 20), False),  # two tiles of four planes for five
        ((320, 320), (6, 20, 20), True),
    ],
)
def test_it_pays_for_wide_convolutions_of_many_voxels(channels, size, expected):
    image, kernels = torch.empty(1, channels[0], *size), torch.empty(channels[1], channels[0], 3, 3, 3)
    assert winograd.pays(image, kernels) is expected


WIDE = Network(
    features=(32, 40), kernels=CUBES, strides=((1, 1, 1), (2, 2, 1)), blocks=(2, 1), decoder_blocks=(1,), heads=0
)


def gradients(network: torch.nn.Module, image: Tensor) -> list[Tensor]:
    network.zero_grad()
    logits = network(image)
    sum(part.square().mean() for part in logits).backward()
    return [*(part.detach() for part in logits), *(weight.grad.clone() for weight in network.parameters())]


def test_a_wide_network_trains_as_with_torchs_layers(monkeypatch):
    torch.manual_seed(2)
    network = build_network(WIDE, 1, 2).train()
    image = torch.randn(1, 1, 16, 32, 32).to(memory_format=torch.channels_last_3d)
    calls: list[Tensor] = []
    real = layers.convolve
    monkeypatch.setattr(layers, "convolve", lambda image, kernels: calls.append(image) or real(image, kernels))
    own = gradients(network, image)
    assert len(calls) == 2  # the second of the encoder's finest, and that of its decoder
    monkeypatch.setattr(layers, "_is_plain", lambda image: False)
    for fast, usual in zip(own, gradients(network, image), strict=True):
        torch.testing.assert_close(fast, usual, rtol=2e-3, atol=2e-5)
    assert len(calls) == 2


def test_a_wide_network_infers_as_with_torchs_layers(monkeypatch):
    torch.manual_seed(4)
    network = build_network(WIDE, 1, 2).eval()
    image = torch.randn(1, 1, 16, 32, 32).to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        own = network(image)
        monkeypatch.setattr(layers, "convolve", None)
        with pytest.raises(TypeError, match="not callable"):
            network(image)
        monkeypatch.setattr(layers, "_is_plain", lambda image: False)
        torch.testing.assert_close(own, network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_half_precision_and_whoever_traces_a_network_see_torchs_layers(monkeypatch):
    monkeypatch.setattr(layers, "pays", lambda image, kernels: True)
    monkeypatch.setattr(layers, "convolve", None)  # to call it is an error
    network = build_network(WIDE.model_copy(update={"features": (2, 3)}), 1, 2).eval()
    image = torch.randn(1, 1, 4, 6, 6)
    with pytest.raises(TypeError, match="not callable"):
        network(image)
    with torch.autocast("cpu", torch.bfloat16):
        network.train()(image)
    torch.jit.trace(network.eval(), image, check_trace=False)
    torch.export.export(network, (image,))


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 2, 1)])
def test_upsampling_in_training_has_torchs_values_and_gradients(stride):
    torch.manual_seed(3)
    up = layers.upsampling(5, 3, stride)
    torch.nn.init.normal_(up.bias)
    image = torch.randn(2, 5, 4, 3, 6)
    found = []
    for mode in (True, False):
        seen = image.clone().requires_grad_()
        values = up.train(mode)(seen)
        gradient = torch.linspace(0, 1, values.numel()).view(values.shape)
        found.append((values, *torch.autograd.grad(values, (seen, up.weight, up.bias), gradient)))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)
