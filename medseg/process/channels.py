"""A channel on the grid of the first: what it is outside of its field of view, and a word where that is much."""

from __future__ import annotations

import warnings

import numpy as np

from medseg.process.resample import resample
from medseg.volume import Array, Grid, Volume

AIR_HU = -1000.0
"""What a CT shows where there is nothing."""

WHOLE = 0.99
"""Share of the first image from which on a channel covers it: fields of view end within a voxel of each other."""

POINTS = 24
"""Points along each axis at which it is looked whether a channel covers the first image."""


def onto_first(channel: Volume, grid: Grid, *, modality: str | None = None) -> Array:
    """Return the voxels (C, I, J, K) of a channel sampled onto the grid of the first (cubic).

    Outside of its field of view a channel has its least value, and a CT (`modality` of DICOM) air, at most. Warns where
    it covers a part of the grid alone. Raises what `resample` raises.
    """
    if channel.grid.matches(grid):
        return channel.array
    fill = channel.array.min(axis=(1, 2, 3))
    if modality == "CT":
        fill = np.minimum(fill, AIR_HU)
        channel = channel.with_array(channel.array.astype(np.float32)) if channel.array.dtype.kind == "u" else channel
    array = resample(channel, grid, order=3, fill=fill).array
    share = covered(grid, channel.grid)
    if share < WHOLE:
        warnings.warn(
            f"A channel covers {100 * share:.0f} % of the first image. Outside of it nothing was measured, and it is "
            "filled up with its least value, or air in a CT. Give scans of one field of view.",
            stacklevel=3,
        )
    return array


def covered(grid: Grid, other: Grid) -> float:
    """Return the share of a grid that lies in the field of view of another."""
    axes = [np.linspace(0, size - 1, POINTS) for size in grid.shape]
    index = other.to_index(grid.to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)))
    reach = 0.501
    return float(((index >= -reach) & (index <= np.asarray(other.shape) - 1 + reach)).all(axis=-1).mean())
