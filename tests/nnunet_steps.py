"""What nnU-Net v2 does with an image, step by step, the slow and plain way: a judge for imported models.

Written after nnU-Net 2.8.1, but that it adds up tiles in float64 and not in float16. Arrays are (z, y, x), as its are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]
Network = Callable[[Array], Array]


def segment(
    image: Array,
    spacing: Sequence[float],
    network: Network,
    plans: dict[str, Any],
    *,
    mirror: Sequence[int] = (),
    order: Sequence[int] = (),
    before: Array | None = None,
) -> Array:
    """Return the label map of an image (C, z, y, x); `order` are the values of regions, if outputs are regions.

    `before` is the label map of the stage before: of each of the labels 1 and 2, the network has one more channel.
    """
    configuration, transpose = plans["configurations"]["3d_fullres"], plans["transpose_forward"]
    image = image.astype(np.float32).transpose(0, *(1 + axis for axis in transpose))
    spacing = [spacing[axis] for axis in transpose]
    whole = np.zeros(image.shape[1:], np.uint16)
    filled = ndimage.binary_fill_holes((image != 0).any(axis=0))
    box = tuple(slice(int(line.min()), int(line.max()) + 1) for line in np.nonzero(filled))
    image, filled = image[(slice(None), *box)], filled[box]
    masked = configuration["use_mask_for_norm"]
    normalized = np.stack([_zscored(part, filled, only=use) for part, use in zip(image, masked, strict=True)])
    target = configuration["spacing"]
    shape = [round(a / b * n) for a, b, n in zip(spacing, target, image.shape[1:], strict=True)]
    prepared = _resized(normalized, shape, spacing, target, 3)
    if before is not None:
        labels = before.transpose(transpose)[box]
        marked = np.where(filled | (labels > 0), labels.astype(float), -1.0)
        steps = (shape, spacing, target)
        shares = np.asarray([_resized((marked == value)[None] * 1.0, *steps, 1)[0] for value in (-1, 0, 1, 2)])
        near = _resized(marked[None], *steps, 0)[0].astype(int)
        tied = np.take_along_axis(shares, near[None] + 1, 0)[0] == shares.max(axis=0)
        values = np.where(tied, near, shares.argmax(axis=0) - 1)
        prepared = np.concatenate([prepared, [values == 1, values == 2]])
    logits = _slid(prepared, network, configuration["patch_size"], mirror)
    scores = _resized(logits, image.shape[1:], target, spacing, 1)
    labels = scores.argmax(axis=0)
    if order:
        labels = np.zeros(scores.shape[1:], int)
        for score, value in zip(scores, order, strict=True):
            labels[score > 0] = value
    whole[box] = labels
    return whole.transpose(np.argsort(transpose))


def _zscored(channel: Array, inside: Array, *, only: bool) -> Array:
    values = channel[inside] if only else channel
    result = (channel - values.mean()) / max(float(values.std()), 1e-8)
    return np.where(inside, result, channel) if only else result


def _resized(data: Array, shape: Sequence[int], before: Sequence[float], after: Sequence[float], order: int) -> Array:
    if tuple(shape) == data.shape[1:]:
        return data
    coarse = None
    for spacing in (before, after):
        if max(spacing) / min(spacing) > 3:
            longest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            coarse = longest[0] if len(longest) == 1 else None
            break
    if coarse is None:
        return np.stack([_zoomed(part, shape, order) for part in data])
    flat = [size for axis, size in enumerate(shape) if axis != coarse]
    slices = [[_zoomed(part, flat, order) for part in np.moveaxis(channel, coarse, 0)] for channel in data]
    rows = (2 * np.arange(shape[coarse]) + 1) * data.shape[1 + coarse] // (2 * shape[coarse])
    return np.moveaxis(np.asarray(slices)[:, rows], 1, 1 + coarse)


def _zoomed(image: Array, shape: Sequence[int], order: int) -> Array:
    factors = np.divide(shape, image.shape)
    result = ndimage.zoom(image.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(result, image.min(), image.max())


def _slid(image: Array, network: Network, patch: Sequence[int], mirror: Sequence[int]) -> Array:
    missing = [max(0, edge - size) for edge, size in zip(patch, image.shape[1:], strict=True)]
    padded = np.pad(image, ((0, 0), *((gap // 2, gap - gap // 2) for gap in missing)))
    weight = np.zeros(patch)
    weight[tuple(edge // 2 for edge in patch)] = 1
    weight = ndimage.gaussian_filter(weight, [edge / 8 for edge in patch], mode="constant")
    weight[weight == 0] = weight[weight > 0].min()
    starts = []
    for size, edge in zip(padded.shape[1:], patch, strict=True):
        count = int(np.ceil((size - edge) / (edge * 0.5))) + 1
        starts.append([int(np.round((size - edge) / max(1, count - 1) * place)) for place in range(count)])
    total, weights = 0.0, np.zeros(padded.shape[1:])
    for corner in product(*starts):
        place = tuple(slice(start, start + edge) for start, edge in zip(corner, patch, strict=True))
        tile = _mirrored(padded[(slice(None), *place)], network, mirror)
        total = np.zeros((len(tile), *padded.shape[1:])) if isinstance(total, float) else total
        total[(slice(None), *place)] += tile * weight
        weights[place] += weight
    kept = tuple(slice(gap // 2, gap // 2 + size) for gap, size in zip(missing, image.shape[1:], strict=True))
    return (total / weights)[(slice(None), *kept)]


def _mirrored(tile: Array, network: Network, axes: Sequence[int]) -> Array:
    flips = [tuple(1 + axis for axis in some) for count in range(len(axes) + 1) for some in combinations(axes, count)]
    return np.mean([np.flip(network(np.flip(tile, flip).copy()), flip) for flip in flips], axis=0)
