"""An image as the network sees it: the one path that training and segmentation share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from medseg.errors import InputError
from medseg.model.plan import Plan
from medseg.process.bias import correct_bias
from medseg.process.corners import corner_grid
from medseg.process.measured import box_around, measured
from medseg.process.normalize import CTNormalization, Mask, Scheme, ZScore, normalize
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
    schemes = [channel.normalization for channel in plan.channels]
    inside = [measured(channel) if plan.measured_only else None for channel in volume.array]
    volume = correct_bias(volume, tuple(channel.bias_correction == "n4" for channel in plan.channels), inside)
    grid = network_grid(volume.grid, plan)
    masks = _masks(volume, schemes, inside, plan)
    volume = _evened(volume, schemes, inside)
    if plan.normalize_first:
        normalized = normalize(finite_float32(volume.array), schemes, masks)
        return _resampled(volume.with_array(normalized), grid, plan)
    if plan.measured_only and not volume.grid.is_orthogonal:  # a box around it has corners that no scan reached
        masks = [np.ones(volume.grid.shape, bool) if mask is None else mask for mask in masks]
    resampled = _resampled(volume, grid, plan)
    there = [None if mask is None else _on_grid(mask, volume, grid) for mask in masks]
    return resampled.with_array(normalize(finite_float32(resampled.array), schemes, there))


def _masks(volume: Volume, schemes: Sequence[Scheme], inside: list[Mask | None], plan: Plan) -> list[Mask | None]:
    """Return for each channel the voxels that its statistics are taken from; None for all."""
    if not any(isinstance(scheme, ZScore) and scheme.nonzero for scheme in schemes):
        return inside
    mask = (volume.array != 0).any(axis=0)
    mask = ndimage.binary_fill_holes(mask) if plan.normalize_first else mask
    return [mask if isinstance(one, ZScore) and one.nonzero else own for one, own in zip(schemes, inside, strict=True)]


def _evened(volume: Volume, schemes: Sequence[Scheme], inside: Sequence[Mask | None]) -> Volume:
    """Return an image in which what was not measured makes no edge for a spline to swing at, and in a CT is air."""
    if all(mask is None for mask in inside):
        return volume
    array = volume.array.astype(np.float32)
    for channel, scheme, mask in zip(array, schemes, inside, strict=True):
        if mask is None:
            continue
        if not isinstance(scheme, CTNormalization):
            channel[~mask] = channel[mask].mean(dtype=np.float64)
        elif scheme.lower is not None:
            channel[~mask] = np.minimum(channel[~mask], scheme.lower)
    return volume.with_array(array)


def _on_grid(mask: Mask, volume: Volume, grid: Grid) -> Mask:
    share = resample(volume.with_array(mask[None].astype(np.float32)), grid, order=1, fill=0)
    return np.asarray(share.array[0] >= 0.5)


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


def box_to_see(volume: Volume, plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the (start, stop) indices of the part of an image that a plan looks at."""
    if plan.crop_nonzero:
        return nonzero_box(volume)
    if plan.measured_only:
        return box_around([measured(channel) for channel in volume.array], volume.grid.shape)
    return (0, 0, 0), volume.grid.shape


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
