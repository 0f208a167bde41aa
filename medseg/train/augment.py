"""Random changes of intensity, on tensors (B, C, I, J, K) of normalized images, on whatever device they are.

The list, its order, ranges and shares are those of nnU-Net v2 (Isensee et al., Nature Methods 2021, supplementary
note 4): noise, blur, brightness, contrast, a coarser scan, gamma of the inverted and of the upright image.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional


def change_intensities(images: Tensor, seeds: Tensor) -> Tensor:
    """Return the images changed at random, each by its own seed, each channel by numbers of its own."""
    for image, seed in zip(images, seeds.tolist(), strict=True):
        random = Generator().manual_seed(seed)
        for change, of_images, of_channels in CHANGES:
            if _uniform(0, 1, random) < of_images:
                for channel in image:
                    if _uniform(0, 1, random) < of_channels:
                        channel.copy_(change(channel, random))
    return images


def noise(channel: Tensor, random: Generator) -> Tensor:
    """Return a channel (I, J, K) with Gaussian noise of a standard deviation between 0 and 0.1."""
    return channel + _normal(channel, random) * _uniform(0, 0.1, random)


def blur(channel: Tensor, random: Generator) -> Tensor:
    """Return a channel smoothed along each axis by a Gaussian with a deviation of half a voxel to one."""
    for axis in range(3):
        offsets = torch.arange(-3, 4, device=channel.device, dtype=channel.dtype)
        kernel = torch.exp(-0.5 * (offsets / _uniform(0.5, 1, random)) ** 2)
        shape = [-1 if place == axis else 1 for place in range(3)]
        padding = [3 * (place == axis) for place in (2, 2, 1, 1, 0, 0)]
        padded = functional.pad(channel[None, None], padding, mode="replicate")
        channel = functional.conv3d(padded, (kernel / kernel.sum()).view(1, 1, *shape))[0, 0]
    return channel


def brightness(channel: Tensor, random: Generator) -> Tensor:
    """Return a channel times a factor between 0.75 and 1.25."""
    return channel * _factor(0.75, 1.25, random)


def contrast(channel: Tensor, random: Generator) -> Tensor:
    """Return a channel spread about its mean by a factor between 0.75 and 1.25, within its old range."""
    mean = channel.mean()
    return ((channel - mean) * _factor(0.75, 1.25, random) + mean).clamp(channel.min(), channel.max())


def coarser(channel: Tensor, random: Generator) -> Tensor:
    """Return a channel as if it had been scanned with voxels up to twice as long."""
    share = _uniform(0.5, 1, random)
    size = [max(1, round(edge * share)) for edge in channel.shape]
    small = functional.interpolate(channel[None, None], size, mode="nearest-exact")
    return functional.interpolate(small, channel.shape, mode="trilinear", align_corners=False)[0, 0]


def gamma(channel: Tensor, random: Generator) -> Tensor:
    """Return a channel whose range is bent by an exponent between 0.7 and 1.5, its mean and spread kept."""
    low, high = channel.aminmax()
    bent = ((channel - low) / (high - low).clamp(min=1e-6)) ** _factor(0.7, 1.5, random)
    return (bent - bent.mean()) / bent.std().clamp(min=1e-6) * channel.std() + channel.mean()


def inverted_gamma(channel: Tensor, random: Generator) -> Tensor:
    """Return a channel whose range is bent from its bright end."""
    return -gamma(-channel, random)


CHANGES = (
    (noise, 0.1, 1),
    (blur, 0.2, 0.5),
    (brightness, 0.15, 1),
    (contrast, 0.15, 1),
    (coarser, 0.25, 0.5),
    (inverted_gamma, 0.1, 1),
    (gamma, 0.3, 1),
)
"""What is done, to which share of the images, and to which share of the channels of such an image."""


def _uniform(low: float, high: float, random: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))


def _normal(like: Tensor, random: Generator) -> Tensor:
    """Return normally distributed numbers; CUDA draws its own, since to wait for those of a CPU takes longer."""
    if like.device.type != "cuda":
        return torch.randn(like.shape, generator=random).to(like)
    seed = int(torch.randint(2**62, (), generator=random))
    return torch.randn(like.shape, generator=Generator(like.device).manual_seed(seed), device=like.device)


def _factor(low: float, high: float, random: Generator) -> float:
    """Return a factor below 1 as often as one above it."""
    return _uniform(low, 1, random) if _uniform(0, 1, random) < 0.5 else _uniform(1, high, random)
