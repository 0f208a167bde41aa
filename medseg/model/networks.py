"""Networks, built from the numbers in a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ModelError
from medseg.model.monai_kinds import MonaiNetwork
from medseg.model.plan import Network, Triple
from medseg.model.winograd import convolve, pays

SLOPE = 0.01
"""Of the leaky ReLU below 0."""

ONE: Triple = (1, 1, 1)


def build_network(network: Network | MonaiNetwork, inputs: int, outputs: int) -> nn.Module:
    """Return an untrained network that takes (B, inputs, I, J, K) to logits (B, outputs, I, J, K).

    In training mode a U-Net returns a list of logits, one for each resolution that has a head, the finest first.
    """
    if not isinstance(network, Network):
        return _monai(network, inputs, outputs)
    return UNet(network, inputs, outputs).apply(_initialize)


def _monai(network: MonaiNetwork, inputs: int, outputs: int) -> nn.Module:
    """Return an untrained network of MONAI that takes (B, inputs, I, J, K) to logits (B, outputs, I, J, K).

    Raises ModelError where MONAI refuses its numbers, or einops is missing.
    """
    if network.kind == "monai_swinunetr" and not find_spec("einops"):
        raise ModelError(
            'SwinUNETR needs a package that is not installed. Install it with: pip install "medseg[swin]"',
            reason="not_installed",
        )
    from monai.networks import nets

    kinds = {
        "monai_unet": nets.UNet,
        "monai_segresnet": nets.SegResNet,
        "monai_dynunet": nets.DynUNet,
        "monai_swinunetr": nets.SwinUNETR,
    }
    settings: dict[str, Any] = network.model_dump(exclude={"kind"})
    try:
        built: nn.Module = kinds[network.kind](spatial_dims=3, in_channels=inputs, out_channels=outputs, **settings)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            "MONAI cannot build the network of the model from its numbers: they contradict each other, or name a layer "
            "that MONAI does not have.",
            reason="network",
        ) from error
    _drop_counters(built)
    return built


def _drop_counters(network: nn.Module) -> None:
    """Leave tables and counters of whole numbers out of the weights: they follow from the kind, or serve training."""
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_floating_point():
                module.register_buffer(name, buffer, persistent=False)


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on a device, in the layout that is fastest there."""
    return network.to(device).to(memory_format=memory_format(device))  # type: ignore[call-overload, no-any-return]


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout of images and weights that convolutions are fastest in: channels last on a CPU."""
    return torch.channels_last_3d if device.type == "cpu" else torch.contiguous_format


class UNet(nn.Module):
    """The U-Net of nnU-Net (Isensee et al., Nature Methods 2021), plain or with a residual encoder.

    The decoder's stages are counted from the bottleneck up, `outputs` from the finest resolution down.
    """

    def __init__(self, plan: Network, inputs: int, outputs: int):
        super().__init__()
        features = plan.features
        self.stem = _Convolution(inputs, features[0], plan.kernels[0]) if plan.residual else nn.Identity()
        widths = [features[0] if plan.residual else inputs, *features]
        block = _Residual if plan.residual else _Convolution
        self.encoder = nn.ModuleList(
            _stage(block, widths[level : level + 2], plan.kernels[level], plan.strides[level], plan.blocks[level])
            for level in range(len(features))
        )
        upward = range(len(features) - 2, -1, -1)
        self.up = nn.ModuleList(
            _upsampling(features[level + 1], features[level], plan.strides[level + 1]) for level in upward
        )
        self.decoder = nn.ModuleList(
            _stage(_Convolution, (2 * features[level], features[level]), plan.kernels[level], ONE, count)
            for level, count in zip(upward, plan.decoder_blocks, strict=True)
        )
        self.outputs = nn.ModuleList(nn.Conv3d(width, outputs, 1) for width in features[: plan.heads + 1])

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return the logits of images; in training mode a list of them."""
        image = self.stem(image)
        skips = []
        for stage in self.encoder:
            image = stage(image)
            skips.append(image)
        skips.pop()
        decoded = []
        for up, stage in zip(self.up, self.decoder, strict=True):
            image = stage(torch.cat([up(image), skips.pop()], dim=1))
            if self.training:
                decoded.append(image)
        if not self.training:
            return self.outputs[0](image)  # type: ignore[no-any-return]
        return [output(part) for output, part in zip(self.outputs, reversed(decoded), strict=False)]


class _Convolution(nn.Module):
    """Convolution, instance normalization and, if `active`, a leaky ReLU.

    The normalization is groups of one channel: the same numbers as torch's InstanceNorm3d, which turns its input back
    into contiguous memory. It subtracts the mean of each channel, so that a bias before it would have no effect.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = ONE, *, active: bool = True):
        super().__init__()
        padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2, (kernel[2] - 1) // 2)
        self.conv = _Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.GroupNorm(outputs, outputs)
        self.active = _leaky_relu() if active else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
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


class _Conv3d(nn.Conv3d):
    """Torch's convolution, faster on a CPU where it is wide."""

    def forward(self, image: Tensor) -> Tensor:
        cube = self.kernel_size == (3, 3, 3) and self.stride == ONE
        if cube and _is_plain(image) and pays(image, self.weight):
            return convolve(image, self.weight)
        return super().forward(image)


class _Upsampling(nn.ConvTranspose3d):
    """Torch's transposed convolution whose kernel is its stride, in training on a CPU as a product of matrices.

    The gradient of its weights takes oneDNN ten times as long.
    """

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
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


class _Residual(nn.Module):
    """Two convolutions beside a skip that pools and projects where resolution and width change.

    Source: He et al., "Bag of tricks for image classification", CVPR 2019 (ResNet-D).
    """

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = ONE):
        super().__init__()
        self.conv1 = _Convolution(inputs, outputs, kernel, stride)
        self.conv2 = _Convolution(outputs, outputs, kernel, active=False)
        self.pool = nn.Identity() if stride == ONE else nn.AvgPool3d(stride)
        self.skip = nn.Identity() if inputs == outputs else _Convolution(inputs, outputs, ONE, active=False)
        self.active = _leaky_relu()

    def forward(self, image: Tensor) -> Tensor:
        return self.active(self.conv2(self.conv1(image)) + self.skip(self.pool(image)))  # type: ignore[no-any-return]


def _stage(
    block: type[_Convolution] | type[_Residual], widths: Sequence[int], kernel: Triple, stride: Triple, count: int
) -> nn.Sequential:
    first = block(widths[0], widths[1], kernel, stride)
    return nn.Sequential(first, *(block(widths[1], widths[1], kernel) for _ in range(count - 1)))


def _leaky_relu() -> nn.Module:
    return nn.LeakyReLU(SLOPE, inplace=True)


def _upsampling(inputs: int, outputs: int, stride: Triple) -> nn.ConvTranspose3d:
    return _Upsampling(inputs, outputs, stride, stride)


def _initialize(module: nn.Module) -> None:
    """Draw weights as He et al. (ICCV 2015) do for leaky ReLUs; a residual block begins as its skip alone."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, _Residual):
        nn.init.zeros_(module.conv2.norm.weight)
