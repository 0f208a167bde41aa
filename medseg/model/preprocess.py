"""An image as the network sees it: the one path that training and segmentation share."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medseg.errors import InputError
from medseg.model.plan import Plan
from medseg.process.bias import correct_bias
from medseg.process.corners import corner_grid
from medseg.process.normalize import ZScore, normalize
from medseg.process.resample import finite_float32, resample
from medseg.process.resize import resize, resize_labels, separate_axis
from medseg.volume import Grid, Volume, box_of

OUTSIDE = -1
"""Marks what is not body in a label map, as nnU-Net does."""


def network_grid(grid: Grid, plan: Plan) -> Grid:
    """Return the grid on which a plan's network sees an image on `grid`: same field of view, axes perpendicular."""
    oriented = _oriented(grid, plan)
    if plan.resampling is None:
        return oriented
    if plan.resampling.method == "corners":
        return corner_grid(oriented, plan.spacing_mm)
    return oriented.with_spacing(plan.spacing_mm)


def nearest_scores(grid: Grid, plan: Plan) -> tuple[int, ...]:
    """Return the axes of the network grid along which scores go to the nearest voxel of an image on `grid`."""
    if plan.resampling is None:
        return ()
    if plan.resampling.nearest_scores:
        return 0, 1, 2
    alone = separate_axis(plan.spacing_mm, _oriented(grid, plan).spacing_mm, plan.resampling.separate_scores)
    return () if alone is None else (alone,)


def prepare(volume: Volume, plan: Plan) -> Volume:
    """Return the image on its network grid, float32, normalized: in which order, and how, the plan says.

    Raises InputError where it has another number of channels than the plan, or voxels that are NaN or infinite.
    """
    if len(volume.array) != len(plan.channels):
        names = ", ".join(channel.name for channel in plan.channels)
        raise InputError(
            f"The model needs {len(plan.channels)} channel(s) ({names}) and the input has {len(volume.array)}; "
            "give one file per channel, in that order.",
            reason="channels",
        )
    volume = correct_bias(volume, tuple(channel.bias_correction == "n4" for channel in plan.channels))
    grid = network_grid(volume.grid, plan)
    schemes = [channel.normalization for channel in plan.channels]
    mask = None
    if any(isinstance(scheme, ZScore) and scheme.nonzero for scheme in schemes):
        mask = (volume.array != 0).any(axis=0)
    if plan.normalize_first:
        holes = None if mask is None else ndimage.binary_fill_holes(mask)
        normalized = normalize(finite_float32(volume.array), schemes, holes)
        return _resampled(volume.with_array(normalized), grid, plan)
    if mask is not None:
        share = resample(volume.with_array(mask[None].astype(np.float32)), grid, order=1, fill=0)
        mask = share.array[0] >= 0.5
    resampled = _resampled(volume, grid, plan)
    return resampled.with_array(normalize(finite_float32(resampled.array), schemes, mask))


def with_labels(prepared: Volume, labels: Volume, image: Volume, plan: Plan) -> Volume:
    """Return a prepared image with one more channel for each label of the plan: 1 where `labels` has it, else 0.

    `labels` (1, I, J, K) lies on the grid of the `image` that was prepared. On the network's grid the label with the
    largest share of a voxel wins; background and what lies outside the body (0 in every channel) count apart.
    """
    how = plan.resampling
    body = ndimage.binary_fill_holes((image.array != 0).any(axis=0))
    marked = np.where((labels.array == 0) & ~body, OUTSIDE, labels.array.astype(np.int32))
    separate = how.separate if how else None
    values = resize_labels(labels.with_array(marked), prepared.grid, separate=separate).array[0]
    channels = [values == label.value for label in plan.labels]
    return prepared.with_array(np.concatenate([prepared.array, np.asarray(channels, np.float32)]))


def nonzero_box(volume: Volume) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the (start, stop) indices of the smallest part that holds all voxels that are not 0 in some channel.

    An image of zeros alone is its own box.
    """
    box = box_of((volume.array != 0).any(axis=0))
    if box is None:
        return (0, 0, 0), volume.grid.shape
    return tuple(part.start for part in box), tuple(part.stop for part in box)


def _oriented(grid: Grid, plan: Plan) -> Grid:
    straight = grid.orthogonalized()
    return straight if plan.orientation == "as_stored" else straight.reoriented(plan.orientation)


def _resampled(volume: Volume, grid: Grid, plan: Plan) -> Volume:
    how = plan.resampling
    if volume.grid.is_orthogonal and how and how.method != "smooth":
        return resize(volume, grid, order=how.order, separate=how.separate)
    # A box around a sheared grid has corners that no scan reached: they are dark, as air is, in each channel.
    fill = None if volume.grid.is_orthogonal else volume.array.min(axis=(1, 2, 3))
    return resample(volume, grid, order=how.order if how else 1, fill=fill)
