"""Labels on the source grid, made row by row as the sliding window finishes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.model.export import argmax_onto, argmax_slab
from medseg.process.resample import parallel_axes
from medseg.volume import Grid

if TYPE_CHECKING:
    from torch import Tensor


def labels_from_rows(
    rows: Iterator[tuple[int, Tensor]], axis: int, grid: Grid, target: Grid, values: NDArray[Any]
) -> NDArray[Any]:
    """Return the labels (I, J, K) on `target`; `values` are the labels of the channels of the logits.

    `rows` are parts of the logits (C, I, J, K) on `grid` as (first row along `axis`, part), in order, each beginning
    with the last row of the one before. A plane of the target is made when the rows that it lies between are there.
    """
    axes = parallel_axes(grid, target)
    if axes is None:
        return values[_argmax_of_all(rows, axis, grid, target)]
    result = np.empty(target.shape, values.dtype)
    along = next(place for place, one in enumerate(axes) if one.source_axis == axis)
    positions = np.clip(axes[along].positions, 0, grid.shape[axis] - 1)
    reached = -1
    for first, logits in rows:
        last = first + logits.shape[axis + 1] - 1
        planes = np.flatnonzero((positions > reached) & (positions <= last))
        reached = last
        if planes.size:
            here = [*axes]
            here[along] = replace(axes[along], positions=positions[planes] - first)
            winners = argmax_slab(logits.permute(0, *(one.source_axis + 1 for one in axes)), here)
            # Positions rise or fall, so the planes of a part are neighbors.
            np.moveaxis(result, along, 0)[planes[0] : planes[-1] + 1] = np.moveaxis(values[winners], along, 0)
    return result


def _argmax_of_all(rows: Iterator[tuple[int, Tensor]], axis: int, grid: Grid, target: Grid) -> NDArray[np.uint16]:
    # Planes of a turned grid cross all rows, so the logits are kept whole.
    start = next(rows)
    whole = start[1].new_empty((len(start[1]), *grid.shape))
    for first, logits in chain([start], rows):
        whole.narrow(axis + 1, first, logits.shape[axis + 1]).copy_(logits)
    return argmax_onto(whole, grid, target)
