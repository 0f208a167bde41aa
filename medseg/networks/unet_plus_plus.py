"""The U-Net++: skips that are nested and dense, and a head on every node of the finest resolution.

Sources: Zhou et al., "UNet++: A nested U-Net architecture", DLMIA 2018; Zhou et al., "UNet++: Redesigning skip
connections", IEEE Transactions on Medical Imaging 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg.networks.kinds import NestedNetwork, Triple
from medseg.networks.layers import ONE, Convolution, cropped, cropped_heads, padded, stage_of, upsampling


class UNetPlusPlus(nn.Module):
    """Node X(i, j) of resolution i joins all earlier nodes of its resolution, and X(i + 1, j - 1) from below.

    `encoder[i]` is X(i, 0), `nodes[i][j - 1]` is X(i, j), and `outputs[j - 1]` the head on X(0, j). In use the last
    head alone counts, which is the paper's fast mode. The first `depth` resolutions with the nodes i + j < depth are
    the network that has `depth` resolutions: what the paper calls pruned.
    """

    def __init__(self, plan: NestedNetwork, inputs: int, outputs: int):
        super().__init__()
        features, kernels, strides, self.divisor = plan.features, plan.kernels, plan.strides, plan.divisor
        self.depth = len(features)
        widths = (inputs, *features)
        self.encoder = nn.ModuleList(
            stage_of(Convolution, widths[level : level + 2], kernels[level], strides[level], plan.blocks)
            for level in range(self.depth)
        )
        self.nodes = nn.ModuleList(
            nn.ModuleList(
                Node(features[level : level + 2], earlier, kernels[level], strides[level + 1], plan.blocks)
                for earlier in range(1, self.depth - level)
            )
            for level in range(self.depth - 1)
        )
        self.outputs = nn.ModuleList(nn.Conv3d(features[0], outputs, 1) for _ in range(self.depth - 1))

    @property
    def stages(self) -> list[nn.Module]:
        """What a training may compute again in the backward pass instead of keeping it."""
        return [*self.encoder, *(module for module in self.nodes.modules() if isinstance(module, Node))]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return the logits of images; in training mode a list of those of all heads, the last first."""
        size = image.shape[2:]
        image = padded(image, self.divisor)
        rows: list[list[Tensor]] = []
        for stage in self.encoder:
            image = stage(image)
            rows.append([image])
        for place in range(self.depth - 1):
            for row, below, nodes in zip(rows, rows[1:], self.nodes, strict=False):
                if place < len(nodes):  # type: ignore[arg-type]
                    row.append(nodes[place](below[place], *row))  # type: ignore[index]
        finest = rows[0][1:]
        if not self.training:
            return cropped(self.outputs[-1](finest[-1]), size)
        return cropped_heads([head(node) for head, node in zip(self.outputs, finest, strict=True)][::-1], size)


class Node(nn.Module):
    """What lies below, brought up, joined with the earlier nodes of a resolution, and some convolutions."""

    def __init__(self, features: tuple[int, ...], earlier: int, kernel: Triple, stride: Triple, blocks: int):
        super().__init__()
        own, below = features
        self.up = upsampling(below, own, stride)
        self.stage = stage_of(Convolution, ((1 + earlier) * own, own), kernel, ONE, blocks)

    def forward(self, below: Tensor, *earlier: Tensor) -> Tensor:
        """Return features (B, own, ...) of those below (B, below, ...) and the earlier ones (B, own, ...)."""
        return self.stage(torch.cat([self.up(below), *earlier], dim=1))  # type: ignore[no-any-return]
