"""An image as the network sees it: the one path that training and segmentation share."""

from __future__ import annotations

import numpy as np

from medseg.errors import InputError
from medseg.model.plan import Plan
from medseg.process.normalize import ZScore, normalize
from medseg.process.resample import finite_float32, resample
from medseg.volume import Grid, Volume


def network_grid(grid: Grid, plan: Plan) -> Grid:
    """Return the grid on which a plan's network sees an image on `grid`: same field of view, axes perpendicular."""
    return grid.orthogonalized().reoriented(plan.orientation).with_spacing(plan.spacing_mm)


def prepare(volume: Volume, plan: Plan) -> Volume:
    """Return the image on its network grid, float32, normalized: reorient and resample first, then normalize.

    Raises InputError where it has another number of channels than the plan, or voxels that are NaN or infinite.
    """
    if len(volume.array) != len(plan.channels):
        names = ", ".join(channel.name for channel in plan.channels)
        raise InputError(
            f"The model needs {len(plan.channels)} channel(s) ({names}) and the input has {len(volume.array)}; "
            "give one file per channel, in that order.",
            reason="channels",
        )
    grid = network_grid(volume.grid, plan)
    # A box around a sheared grid has corners that no scan reached: they are dark, as air is.
    fill = None if volume.grid.is_orthogonal else float(volume.array.min())
    resampled = resample(volume, grid, order=plan.order, fill=fill)
    schemes = [channel.normalization for channel in plan.channels]
    mask = None
    if any(isinstance(scheme, ZScore) and scheme.nonzero for scheme in schemes):
        nonzero = volume.with_array((volume.array != 0).any(axis=0, keepdims=True).astype(np.float32))
        mask = resample(nonzero, grid, order=1, fill=0).array[0] >= 0.5
    return resampled.with_array(normalize(finite_float32(resampled.array), schemes, mask))


def nonzero_box(volume: Volume) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the (start, stop) indices of the smallest part that holds all voxels that are not 0 in some channel.

    An image of zeros alone is its own box.
    """
    nonzero = (volume.array != 0).any(axis=0)
    lines = [np.flatnonzero(nonzero.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
    if not lines[0].size:
        return (0, 0, 0), volume.grid.shape
    return tuple(int(line[0]) for line in lines), tuple(int(line[-1]) + 1 for line in lines)
