"""Random changes of intensity, on tensors (B, C, I, J, K) of normalized images, on whatever device they are.

Ranges and shares as in nnU-Net (Isensee et al., Nature Methods 2021, supplementary note 4).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def change_intensities(images: Tensor, seeds: Tensor) -> Tensor:
    """Return the images with noise, brightness, contrast and gamma changed at random, each image by its own seed."""
    for image, seed in zip(images, seeds.tolist(), strict=True):
        random = Generator().manual_seed(seed)
        for change, share in CHANGES:
            if float(torch.rand((), generator=random)) < share:
                image.copy_(change(image, random))
    return images


def noise(image: Tensor, random: Generator) -> Tensor:
    """Return the image with Gaussian noise of a standard deviation between 0 and 0.1 of the image's own."""
    drawn = torch.randn(image.shape, generator=random).to(image)
    return image + drawn * _uniform(0, 0.1, random)


def brightness(image: Tensor, random: Generator) -> Tensor:
    """Return the image times a factor between 0.75 and 1.25."""
    return image * _uniform(0.75, 1.25, random)


def contrast(image: Tensor, random: Generator) -> Tensor:
    """Return the image spread about its mean by a factor between 0.75 and 1.25, within its old range."""
    mean = image.mean()
    return ((image - mean) * _uniform(0.75, 1.25, random) + mean).clamp(image.min(), image.max())


def gamma(image: Tensor, random: Generator) -> Tensor:
    """Return the image's range bent by an exponent between 0.7 and 1.5, inverted at times, mean and spread kept."""
    sign = -1.0 if float(torch.rand((), generator=random)) < 0.25 else 1.0
    low, high = (image * sign).aminmax()
    span = (high - low).clamp(min=1e-6)
    bent = ((image * sign - low) / span) ** _uniform(0.7, 1.5, random) * sign
    return (bent - bent.mean()) / bent.std().clamp(min=1e-6) * image.std() + image.mean()


CHANGES = ((noise, 0.1), (brightness, 0.15), (contrast, 0.15), (gamma, 0.3))


def _uniform(low: float, high: float, random: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))
