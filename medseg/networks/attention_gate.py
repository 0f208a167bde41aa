"""Attention gates, which weigh the voxels of a skip by what the coarser features below have seen.

Source: Oktay et al., "Attention U-Net: learning where to look for the pancreas", MIDL 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.networks.kinds import Triple
from medseg.networks.layers import ONE


class AttentionGate(nn.Module):
    """An additive gate: one coefficient for each voxel of the coarser resolution, interpolated to those of the skip.

    As in the paper nothing is normalized within it, and half of the skip's features are enough.
    """

    def __init__(self, width: int, coarse_width: int, stride: Triple):
        super().__init__()
        inner = max(1, width // 2)
        self.stride = stride
        self.from_skip = nn.Conv3d(width, inner, stride, stride, bias=False)
        self.from_below = nn.Conv3d(coarse_width, inner, 1)
        self.score = nn.Conv3d(inner, 1, 1)

    def coefficients(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return coefficients (B, 1, I, J, K) between 0 and 1 for the voxels of a skip (B, width, I, J, K)."""
        scores = self.score(functional.relu(self.from_skip(skip) + self.from_below(below)))
        coarse = torch.sigmoid(scores)
        if self.stride == ONE:
            return coarse
        return functional.interpolate(coarse, scale_factor=tuple(map(float, self.stride)), mode="trilinear")

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return the skip, each voxel times its coefficient."""
        return skip * self.coefficients(skip, below)
