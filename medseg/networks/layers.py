"""Layers that medseg's networks share, each as fast as a CPU and a GPU allow."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.networks.kinds import Triple
from medseg.networks.winograd import convolve, pays

SLOPE = 0.01
"""Of the leaky ReLU below 0."""

ONE: Triple = (1, 1, 1)


def padded(image: Tensor, divisor: Triple) -> Tensor:
    """Return images (B, C, I, J, K) with zeros behind, so that each edge can be divided; as they are where it can."""
    missing = [-edge % by for edge, by in zip(image.shape[2:], divisor, strict=True)]
    if not any(missing):
        return image
    return functional.pad(image, [length for edge in reversed(missing) for length in (0, edge)])


def cropped(image: Tensor, size: Sequence[int]) -> Tensor:
    """Return images without what lies behind a size (I, J, K); as they are where nothing does."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    i, j, k = size
    return image[:, :, :i, :j, :k]


def cropped_heads(heads: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
    """Return logits of several resolutions, the finest first, each without what lies behind images of a size."""
    finest = heads[0].shape[2:]
    return [
        cropped(head, [-(-edge * own // full) for edge, own, full in zip(size, head.shape[2:], finest, strict=True)])
        for head in heads
    ]


def is_head(network: nn.Module, name: str) -> bool:
    """Return whether a weight or a module of this name is, or lies in, one of the last layers of a network.

    A network says in `last_layers` what these names begin with, as a regular expression; by default it is "outputs".
    """
    return re.match(getattr(network, "last_layers", r"outputs\."), f"{name}.") is not None


class Convolution(nn.Module):
    """Convolution, instance normalization and, if `active`, a leaky ReLU.

    The normalization is groups of one channel: the same numbers as torch's InstanceNorm3d, which turns its input back
    into contiguous memory. It subtracts the mean of each channel, so that a bias before it would have no effect.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = ONE, *, active: bool = True):
        super().__init__()
        padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2, (kernel[2] - 1) // 2)
        self.conv = WideConv3d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.GroupNorm(outputs, outputs)
        self.active = leaky_relu() if active else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Return the features (B, outputs, ...) of images (B, inputs, ...)."""
        image = self.conv(image)
        by_hand = image.device.type == "cpu" and not torch.compiler.is_compiling()  # a compiler joins them itself
        if self.training and by_hand and not isinstance(self.active, nn.Identity):
            return _NormalizedActive.apply(image, self.norm.weight, self.norm.bias, self.norm.eps)  # type: ignore[no-any-return,no-untyped-call]
        return self.active(self._normalized(image))  # type: ignore[no-any-return]

    def _normalized(self, image: Tensor) -> Tensor:
        if image.device.type != "cuda" or image.dtype == torch.float32:
            return self.norm(image)  # type: ignore[no-any-return]
        # Autocast would copy the image to float32 and back. Its statistics are computed in float32 here, too.
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.norm.weight.to(image.dtype), self.norm.bias.to(image.dtype)
            return functional.group_norm(image, self.norm.num_groups, weight, bias, self.norm.eps)


class WideConv3d(nn.Conv3d):
    """Torch's convolution, faster on a CPU where it is wide."""

    def forward(self, image: Tensor) -> Tensor:
        """Return what torch returns, up to rounding."""
        cube = self.kernel_size == (3, 3, 3) and self.stride == ONE
        if cube and _is_plain(image) and pays(image, self.weight):
            return convolve(image, self.weight)
        return super().forward(image)


class Upsampling(nn.ConvTranspose3d):
    """Torch's transposed convolution whose kernel is its stride, in training on a CPU as a product of matrices.

    The gradient of its weights takes oneDNN ten times as long.
    """

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        """Return features with as many voxels for each as the stride says."""
        if not (self.training and _is_plain(image)) or self.bias is None:
            return super().forward(image)
        factors = self.weight.shape[2:]
        flat = functional.linear(
            image.movedim(1, -1),
            self.weight.movedim((0, 1), (-1, -2)).flatten(0, 3),
            self.bias.repeat(math.prod(factors)),
        )
        # (B, I, J, K, a, b, c, C) to (B, C, I a, J b, K c)
        parts = flat.view(*flat.shape[:-1], *factors, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return parts.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


class Interpolation(nn.Conv3d):
    """A change of width by a convolution of single voxels, and linear interpolation, which leaves no checkerboard.

    Both orders give the same; this one convolves fewer voxels.
    """

    def __init__(self, inputs: int, outputs: int, scale: Triple):
        super().__init__(inputs, outputs, 1)
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        """Return features with as many voxels for each as the scale says."""
        scale = tuple(map(float, self.scale))
        return functional.interpolate(super().forward(image), scale_factor=scale, mode="trilinear")


def _is_plain(image: Tensor) -> bool:
    """Return whether a layer sees single precision on a CPU, and computes rather than being traced or compiled."""
    single = image.device.type == "cpu" and image.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return single and not traced and not torch.compiler.is_compiling()


class _NormalizedActive(torch.autograd.Function):
    """Group normalization of single channels and a leaky ReLU, for training in channels-last memory on a CPU.

    Torch's own backward pass reads this layout out of order and takes twice as long: a sixth of a step of training.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        batch, channels, *size = image.shape
        out, mean, rstd = torch.native_group_norm(image, weight, bias, batch, channels, math.prod(size), channels, eps)
        out = functional.leaky_relu_(out, SLOPE)
        ctx.save_for_backward(image, weight, mean, rstd, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, weight, mean, rstd, out = ctx.saved_tensors
        gradient = torch.ops.aten.leaky_relu_backward(gradient, out, SLOPE, True)
        rows, rows_of_image = (tensor.movedim(1, -1).flatten(1, -2) for tensor in (gradient, image))
        total = rows.sum(dim=1)
        along = ((rows * rows_of_image).sum(dim=1) - mean * total) * rstd
        # d out / d image = weight * rstd * (gradient - its mean - normalized image * mean of their product)
        scale = weight * rstd
        slope = -scale * rstd * along / rows.shape[1]
        offset = -scale * total / rows.shape[1] - slope * mean
        scale, slope, offset = (part[..., None, None, None] for part in (scale, slope, offset))
        return torch.addcmul(offset, image, slope).addcmul_(gradient, scale), along.sum(0), total.sum(0), None


class Residual(nn.Module):
    """Two convolutions beside a skip that pools and projects where resolution and width change.

    Source: He et al., "Bag of tricks for image classification", CVPR 2019 (ResNet-D).
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = ONE):
        super().__init__()
        self.conv1 = Convolution(inputs, outputs, kernel, stride)
        self.conv2 = Convolution(outputs, outputs, kernel, active=False)
        self.pool = nn.Identity() if stride == ONE else nn.AvgPool3d(stride)
        self.skip = nn.Identity() if inputs == outputs else Convolution(inputs, outputs, ONE, active=False)
        self.active = leaky_relu()

    def forward(self, image: Tensor) -> Tensor:
        """Return features of the outputs' width, as coarse as the stride says."""
        return self.active(self.conv2(self.conv1(image)) + self.skip(self.pool(image)))  # type: ignore[no-any-return]


def stage_of(
    block: type[Convolution] | type[Residual], widths: Sequence[int], kernel: Triple, stride: Triple, count: int
) -> nn.Sequential:
    """Return `count` blocks in a row, the first of which changes width and resolution."""
    first = block(widths[0], widths[1], kernel, stride)
    return nn.Sequential(first, *(block(widths[1], widths[1], kernel) for _ in range(count - 1)))


def leaky_relu() -> nn.Module:
    """Return the activation of medseg's own networks."""
    return nn.LeakyReLU(SLOPE, inplace=True)


def upsampling(inputs: int, outputs: int, stride: Triple, *, interpolated: bool = False) -> nn.Module:
    """Return a transposed convolution whose kernel is its stride, or a change of width and interpolation."""
    if interpolated:
        return Interpolation(inputs, outputs, stride)
    return Upsampling(inputs, outputs, stride, stride)


class ZeroLinear(nn.Linear):
    """The last layer of a residual branch, which is 0 at first, so that its block begins as its skip alone."""


def initialize(module: nn.Module) -> None:
    """Draw weights as He et al. (ICCV 2015) do for leaky ReLUs, and those of transformers as Dosovitskiy et al. (2021).

    A residual block begins as its skip alone.
    """
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Residual):
        nn.init.zeros_(module.conv2.norm.weight)
    elif isinstance(module, ZeroLinear):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
