"""The U-Net, plain, with a residual encoder, or with attention gates on its skips.

Sources: Ronneberger et al., "U-Net", MICCAI 2015; Cicek et al., "3D U-Net", MICCAI 2016; Isensee et al., "nnU-Net",
Nature Methods 2021, and "nnU-Net revisited", MICCAI 2024 (residual encoders); Oktay et al., MIDL 2018 (gates).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg.networks.attention_gate import AttentionGate
from medseg.networks.kinds import Network
from medseg.networks.layers import ONE, Convolution, Residual, cropped, cropped_heads, padded, stage_of, upsampling


class UNet(nn.Module):
    """The U-Net of nnU-Net (Isensee et al., Nature Methods 2021), or one of its variants.

    The decoder's stages are counted from the bottleneck up, `outputs` from the finest resolution down.
    """

    def __init__(self, plan: Network, inputs: int, outputs: int):
        super().__init__()
        features, self.divisor = plan.features, plan.divisor
        self.stem = Convolution(inputs, features[0], plan.kernels[0]) if plan.residual else nn.Identity()
        widths = [features[0] if plan.residual else inputs, *features]
        block = Residual if plan.residual else Convolution
        pooled, interpolated = plan.downsampling == "pooled", plan.upsampling == "interpolated"
        self.pools = nn.ModuleList(nn.MaxPool3d(stride) if pooled else nn.Identity() for stride in plan.strides)
        strides = [ONE if pooled else stride for stride in plan.strides]
        self.encoder = nn.ModuleList(
            stage_of(block, widths[level : level + 2], plan.kernels[level], strides[level], plan.blocks[level])
            for level in range(len(features))
        )
        upward = range(len(features) - 2, -1, -1)
        between = [(features[level], features[level + 1], plan.strides[level + 1]) for level in upward]
        self.up = nn.ModuleList(
            upsampling(coarse, fine, stride, interpolated=interpolated) for fine, coarse, stride in between
        )
        self.gates = nn.ModuleList(AttentionGate(*sizes) for sizes in between if plan.attention)
        self.decoder = nn.ModuleList(
            stage_of(Convolution, (2 * features[level], features[level]), plan.kernels[level], ONE, count)
            for level, count in zip(upward, plan.decoder_blocks, strict=True)
        )
        self.outputs = nn.ModuleList(nn.Conv3d(width, outputs, 1) for width in features[: plan.heads + 1])

    @property
    def stages(self) -> list[nn.Module]:
        """What a training may compute again in the backward pass instead of keeping it."""
        return [*self.encoder, *self.decoder]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return the logits of images; in training mode a list of them."""
        size = image.shape[2:]
        image = self.stem(padded(image, self.divisor))
        skips = []
        for pool, stage in zip(self.pools, self.encoder, strict=True):
            image = stage(pool(image))
            skips.append(image)
        skips.pop()
        decoded = []
        for level, (up, stage) in enumerate(zip(self.up, self.decoder, strict=True)):
            skip = skips.pop()
            if self.gates:
                skip = self.gates[level](skip, image)
            image = stage(torch.cat([up(image), skip], dim=1))
            if self.training:
                decoded.append(image)
        if not self.training:
            return cropped(self.outputs[0](image), size)
        heads = [output(part) for output, part in zip(self.outputs, reversed(decoded), strict=False)]
        return cropped_heads(heads, size)
