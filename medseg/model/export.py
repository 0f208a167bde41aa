"""Class scores of the network grid turned into labels on the grid of the source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.process.resample import AxisPositions, axis_matrix, parallel_axes
from medseg.volume import Grid

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_SCORES = 2**26
"""Scores held at once while they are brought onto the source grid: 256 MB of float32."""


def argmax_onto(logits: Tensor, grid: Grid, target: Grid) -> NDArray[np.uint16]:
    """Return, for each voxel of `target`, the channel of `logits` (C, I, J, K on `grid`) that wins there.

    Scores are interpolated linearly and then compared, block by block, so that memory holds scores of one block alone;
    comparing first and interpolating labels would leave stairs at every border.
    """
    result = np.empty(target.shape, np.uint16)
    axes = parallel_axes(grid, target)
    rows = max(1, BLOCK_SCORES // (len(logits) * target.shape[1] * target.shape[2]))
    for first in range(0, target.shape[0], rows):
        stop = min(first + rows, target.shape[0])
        if axes is None:
            block = target.cropped((first, 0, 0), (stop, *target.shape[1:]))
            scores = _turned(logits, grid, block)
        else:
            head = AxisPositions(axes[0].source_axis, axes[0].positions[first:stop], axes[0].step)
            scores = _parallel(logits, [head, *axes[1:]])
        result[first:stop] = scores.argmax(dim=0).cpu().numpy()
    return result


def _parallel(logits: Tensor, axes: list[AxisPositions]) -> Tensor:
    import torch

    scores = logits.permute(0, *(axis.source_axis + 1 for axis in axes))
    for place, axis in enumerate(axes):
        matrix = axis_matrix(axis, scores.shape[place + 1], order=1, smooth=False)
        used = np.flatnonzero(matrix.any(axis=0))
        scores = scores.narrow(place + 1, int(used[0]), int(used[-1] - used[0] + 1))
        weights = torch.from_numpy(matrix[:, used[0] : used[-1] + 1]).to(logits)
        scores = torch.movedim(torch.tensordot(scores, weights, dims=([place + 1], [1])), -1, place + 1)
    return scores


def _turned(logits: Tensor, grid: Grid, block: Grid) -> Tensor:
    import torch
    from torch.nn.functional import grid_sample

    step = np.linalg.solve(grid.affine, block.affine)
    index = [torch.arange(n, dtype=torch.float64) for n in block.shape]
    position = torch.stack(torch.meshgrid(*index, indexing="ij"), dim=-1) @ torch.from_numpy(step[:3, :3].T)
    position = position + torch.from_numpy(step[:3, 3])
    # grid_sample counts each axis from -1 to 1 between the outer voxel centres, and names the last axis first.
    size = torch.tensor(grid.shape, dtype=torch.float64)
    unit = (2 * position / (size - 1).clamp(min=1) - 1).flip(-1)
    sampled = grid_sample(
        logits[None], unit[None].to(logits), mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled[0]


def argmax_slab(logits: Tensor, axes: list[AxisPositions]) -> NDArray[np.uint16]:
    """Return the winner at each crossing of the positions along the three axes of `logits` (C, I, J, K)."""
    plain = [AxisPositions(place, axis.positions, axis.step) for place, axis in enumerate(axes)]
    rows = max(1, BLOCK_SCORES // (len(logits) * len(axes[1].positions) * len(axes[2].positions)))
    parts = []
    for first in range(0, len(axes[0].positions), rows):
        head = AxisPositions(0, axes[0].positions[first : first + rows], axes[0].step)
        parts.append(_parallel(logits, [head, *plain[1:]]).argmax(dim=0).cpu().numpy().astype(np.uint16))
    return np.concatenate(parts)
