"""Wide 3 x 3 x 3 convolutions on a CPU with half of the multiplications, and their gradients.

Winograd's F(4, 3) along the first spatial axis (Lavin and Gray, "Fast algorithms for convolutional neural networks",
CVPR 2016): six planes of the image are mixed into their values at six points (0, 1, -1, 2, -2 and infinity), each is
convolved with a kernel of 3 x 3, and the six results are mixed into four planes; by definition four planes take
twelve such convolutions. Along one axis alone this is as exact as torch's sums, to some 1e-6 of their size. GPUs have
it in their libraries; torch has nothing like it for a CPU.

Arrays are channels last, (B, I, J, K, C), and are worked on in slabs of planes that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

POINTS = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]).double() / 24
"""The values of a kernel's three planes at the six points."""

SLAB = 300_000
"""The most numbers of one point in a slab, unless four planes are more."""

PIECE = 1024
"""Voxels that one product of matrices sums over, about."""

WIDE, LARGE = 32, 15e6
"""Channels, and voxels times channels in times channels out, from which mixing costs less than it saves."""

_by_definition = ContextVar("_by_definition", default=False)


@contextmanager
def by_definition() -> Iterator[None]:
    """Let all convolutions be computed as they are defined, for whoever counts their operations."""
    token = _by_definition.set(True)
    try:
        yield
    finally:
        _by_definition.reset(token)


def pays(image: Tensor, kernels: Tensor) -> bool:
    """Return whether a convolution of (B, C, I, J, K) with (D, C, 3, 3, 3) is large enough to be faster here."""
    if _by_definition.get():
        return False
    channels, planes = kernels.shape[:2], image.shape[2]
    left = 6 * _tiles(planes) / (3 * planes)  # convolutions of planes, as a share of those by definition
    return left <= 3 / 4 and min(channels) >= WIDE and image[0, 0].numel() * math.prod(channels) >= LARGE


def convolve(image: Tensor, kernels: Tensor) -> Tensor:
    """Return the convolution of an image (B, C, I, J, K) with kernels (D, C, 3, 3, 3): (B, D, I, J, K).

    Outside the image is 0, no bias is added, and the result is in channels-last memory.
    """
    return _Winograd.apply(image, kernels)  # type: ignore[no-any-return,no-untyped-call]


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(image, kernels)
        return _channels_first(_convolved(_channels_last(image), kernels))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        image, kernels = ctx.saved_tensors
        gradient = _channels_last(gradient)
        of_image = of_kernels = None
        if ctx.needs_input_grad[0]:
            of_image = _channels_first(_convolved(gradient, kernels.transpose(0, 1).flip(2, 3, 4)))
        if ctx.needs_input_grad[1]:
            of_kernels = _gradient_of_kernels(_channels_last(image), gradient)
        return of_image, of_kernels


def _channels_last(image: Tensor) -> Tensor:
    return image.movedim(1, -1).contiguous()


def _channels_first(image: Tensor) -> Tensor:
    return image.movedim(-1, 1)


def _convolved(images: Tensor, kernels: Tensor) -> Tensor:
    at_points = torch.einsum("pi,dcijk->pdcjk", POINTS.to(kernels), kernels)
    flat_kernels = [kernel.contiguous(memory_format=torch.channels_last) for kernel in at_points]
    results = images.new_empty(*images.shape[:-1], len(kernels))
    slabs = _slabs(images)
    values = images.new_empty(6, len(slabs[0]) // 4, *images.shape[2:])
    for image, result in zip(images, results, strict=True):
        for slab in slabs:
            _mix_image(_planes(image, slab.start - 1, slab.stop + 1), values)
            convolved = [
                functional.conv2d(value.movedim(-1, 1), kernel, padding=1).movedim(1, -1)
                for value, kernel in zip(values, flat_kernels, strict=True)
            ]
            part = result[slab.start : slab.stop]
            whole = part if len(part) == len(slab) else part.new_empty(len(slab), *part.shape[1:])
            _unmix(convolved, whole)
            if whole is not part:
                part.copy_(whole[: len(part)])
    return results


def _gradient_of_kernels(images: Tensor, gradients: Tensor) -> Tensor:
    """Return the gradient (D, C, 3, 3, 3) for images (B, I, J, K, C) and gradients (B, I, J, K, D).

    Each of the 3 x 3 places of a kernel is a product of matrices, gradient by image, of voxels that lie as far apart.
    Planes lie voxel after voxel with zeros behind each row and each plane, so that to move by a place is to begin
    elsewhere.
    """
    _, _, height, width, channels = images.shape
    slabs = _slabs(images)
    tiles, row = len(slabs[0]) // 4, width + 1
    used = tiles * (height + 1) * row
    pieces = max(1, round(used / PIECE))
    length = used // pieces + 1  # at least one more in all: the first place lies a row and a voxel before
    count, border = 6 * pieces * length, row + 1
    image_voxels = images.new_zeros(border + count + border, channels)
    gradient_voxels = images.new_zeros(count, gradients.shape[-1])

    def planes(voxels: Tensor) -> Tensor:
        bordered = voxels.view(6, pieces * length, -1)[:, :used].view(6, tiles, height + 1, row, -1)
        return bordered[:, :, :height, :width]

    image_values, gradient_values = planes(image_voxels[border:-border]), planes(gradient_voxels)
    left = gradient_voxels.view(6 * pieces, length, -1).transpose(1, 2)
    begins = [row * down + right for down in range(3) for right in range(3)]
    places = [image_voxels[begin : begin + count].view(6 * pieces, length, channels) for begin in begins]
    sums = images.new_zeros(len(places), 6 * pieces, gradients.shape[-1], channels)
    for image, gradient in zip(images, gradients, strict=True):
        for slab in slabs:
            _mix_image(_planes(image, slab.start - 1, slab.stop + 1), image_values)
            _mix_gradient(_planes(gradient, slab.start, slab.stop), gradient_values)
            for total, place in zip(sums, places, strict=True):
                torch.baddbmm(total, left, place, out=total)
    at_points = sums.view(3, 3, 6, pieces, *sums.shape[2:]).sum(dim=3)
    return torch.einsum("pi,jkpdc->dcijk", POINTS.to(images), at_points)


def _tiles(planes: int) -> int:
    return -(-planes // 4)


def _slabs(images: Tensor) -> list[range]:
    """Return ranges of planes: all of one size, a multiple of four; the last may reach beyond the image."""
    tiles, plane = _tiles(images.shape[1]), images[0, 0].numel()
    counts = (count for count in range(2, tiles + 1) if tiles % count == 0 and count * plane <= SLAB)
    size = 4 * max(counts, default=1)
    return [range(begin, begin + size) for begin in range(0, 4 * tiles, size)]


def _planes(image: Tensor, begin: int, end: int) -> Tensor:
    """Return planes of an image (I, J, K, C); those outside it are 0."""
    inside = slice(max(begin, 0), min(end, len(image)))
    if (inside.start, inside.stop) == (begin, end):
        return image[inside]
    planes = image.new_zeros(end - begin, *image.shape[1:])
    planes[inside.start - begin : inside.stop - begin] = image[inside]
    return planes


def _mix_image(planes: Tensor, values: Tensor) -> None:
    """Write the values of an image at the six points, from four planes for each tile and one more at either end."""
    p0, p1, p2, p3, p4, p5 = (planes[first : len(planes) - 5 + first : 4] for first in range(6))
    torch.add(p4, p0, alpha=4, out=values[0]).sub_(p2, alpha=5)
    torch.add(p5, p1, alpha=4, out=values[5]).sub_(p3, alpha=5)
    even, odd = p4 - p2, p3 - p1
    torch.add(even, odd, alpha=2, out=values[3])
    torch.sub(even, odd, alpha=2, out=values[4])
    even.sub_(p2, alpha=3)
    odd.sub_(p1, alpha=3)
    torch.add(even, odd, out=values[1])
    torch.sub(even, odd, out=values[2])


def _unmix(values: list[Tensor], planes: Tensor) -> None:
    """Write the four planes of each tile from their values at the six points, which are lost."""
    at_0, at_1, at_minus_1, at_2, at_minus_2, at_infinity = values
    even, odd = at_1 + at_minus_1, at_1.sub_(at_minus_1)
    even_2, odd_2 = at_2 + at_minus_2, at_2.sub_(at_minus_2)
    torch.add(even, even_2, out=planes[0::4]).add_(at_0)
    torch.add(odd, odd_2, alpha=2, out=planes[1::4])
    torch.add(even, even_2, alpha=4, out=planes[2::4])
    torch.add(odd, odd_2, alpha=8, out=planes[3::4]).add_(at_infinity)


def _mix_gradient(planes: Tensor, values: Tensor) -> None:
    """Write the values of a gradient at the six points, from the four planes of each tile: `_unmix` transposed."""
    p0, p1, p2, p3 = (planes[first::4] for first in range(4))
    values[0].copy_(p0)
    values[5].copy_(p3)
    even, odd = p0 + p2, p1 + p3
    torch.add(even, odd, out=values[1])
    torch.sub(even, odd, out=values[2])
    even.add_(p2, alpha=3)
    odd.add_(p3, alpha=3)
    torch.add(even, odd, alpha=2, out=values[3])
    torch.sub(even, odd, alpha=2, out=values[4])
