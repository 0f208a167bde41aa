"""SegFormer: a transformer of several resolutions, and a head that adds them up.

Sources: Xie et al., "SegFormer", NeurIPS 2021; Perera et al., "SegFormer3D", CVPR workshops 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from medseg.networks.attention import ChannelNorm, TransformerBlock
from medseg.networks.kinds import SegFormerNumbers, Triple
from medseg.networks.layers import ONE, Convolution, cropped, padded


class SegFormer(nn.Module):
    """Stages of patch embeddings and transformer blocks; a head adds up what each of them says.

    The keys of each stage are as many as the voxels of the coarsest. The paper joins the features of the stages and
    mixes them by one matrix, which is the sum of a matrix for each.
    """

    def __init__(self, plan: SegFormerNumbers, inputs: int, outputs: int):
        super().__init__()
        self.divisor = plan.divisor
        widths = [inputs, *plan.features]
        self.encoder = nn.ModuleList(_stage(plan, level, widths[level]) for level in range(len(plan.features)))
        self.lateral = nn.ModuleList(nn.Conv3d(width, plan.decoder_features, 1) for width in plan.features)
        self.mix = Convolution(plan.decoder_features, plan.decoder_features, ONE)
        self.outputs = nn.Conv3d(plan.decoder_features, outputs, 1)

    @property
    def stages(self) -> list[nn.Module]:
        """What a training may compute again in the backward pass instead of keeping it."""
        return [*self.encoder]

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of images, (B, outputs, I, J, K)."""
        size = image.shape[2:]
        image = padded(image, self.divisor)
        whole, seen = image.shape[2:], []
        for stage, lateral in zip(self.encoder, self.lateral, strict=True):
            image = stage(image)
            seen.append(lateral(image))
        finest = seen[0].shape[2:]
        mixed = self.mix(seen[0] + sum(_resized(features, finest) for features in seen[1:]))
        return cropped(_resized(self.outputs(mixed), whole), size)


def _stage(plan: SegFormerNumbers, level: int, inputs: int) -> nn.Sequential:
    """Return a stage: an embedding of overlapping patches, blocks, and a normalization."""
    width, kernel, stride = plan.features[level], plan.kernels[level], plan.strides[level]
    heads, hidden, reduction = plan.attention_heads[level], plan.mlp_ratio * width, plan.reductions[level]
    blocks = (TransformerBlock(width, heads, hidden, kernel, reduction) for _ in range(plan.layers[level]))
    return nn.Sequential(_embedding(inputs, width, kernel, stride), ChannelNorm(width), *blocks, ChannelNorm(width))


def _embedding(inputs: int, width: int, kernel: Triple, stride: Triple) -> nn.Conv3d:
    """Return a convolution whose patches overlap: 7 voxels wide every 4 voxels, 3 wide every 2, as in the paper."""
    i, j, k = (max(edge, 2 * step - 1) for edge, step in zip(kernel, stride, strict=True))
    return nn.Conv3d(inputs, width, (i, j, k), stride, padding=(i // 2, j // 2, k // 2))


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return functional.interpolate(image, tuple(size), mode="trilinear")
