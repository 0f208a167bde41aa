"""Mean field of a dense CRF on logits that stream: rows go in, and come out when all that they depend on has come.

The model is that of Krähenbühl and Koltun (NeurIPS 2011): a Potts model with a Gaussian of distance and one of distance
and intensity. The sum over neighbors is exact within a window, as in ConvCRF (Teichmann and Cipolla, 2018). Each
iteration is a stage that holds a few rows, so that memory does not grow along the streamed axis, and nothing is
computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from medseg.model.crf import CRF, Neighbors
from medseg.model.stream import Rows
from medseg.model.timing import Report
from medseg.volume import Volume

CHUNK_ROWS = 8
"""Rows that go through an iteration together."""

BLOCK_VOXELS = {"cpu": 2**15}
"""Voxels that are computed together: on a CPU they, and what they need, stay in its cache."""

WIDE_BLOCK_VOXELS = 2**22
"""The same on other devices."""

NEGLIGIBLE = math.log(1e6)
"""Log-odds of a class that has no share: less than one in a million."""

Box = tuple[tuple[int, int], ...]
"""The first index of a part and the one behind its last, along each axis."""

Part = tuple[Tensor, Tensor]
"""Rows (C, I, J, K) along the first axis: the logits of the network, and as the iterations so far leave them."""


def refined(
    rows: Rows, axis: int, image: Volume, crf: CRF, *, regions: bool = False, report: Report | None = None
) -> Rows:
    """Yield rows of logits as mean field leaves them: those of the probabilities that it ends with.

    `rows` are logits (C, I, J, K) along `axis` on the grid of `image`, which is what the network saw; what comes out
    are such rows, too. Outputs are classes of which one is true or, with `regions`, each for itself. The time
    that it takes is a stage of the `report`.
    Raises UsageError where a voxel has too many neighbors.
    """
    order = (axis, *(other for other in range(3) if other != axis))
    neighbors = Neighbors.of(crf, [image.grid.spacing_mm[one] for one in order])
    field = _Field(
        torch.from_numpy(image.array).permute(0, *(one + 1 for one in order)), neighbors, regions, report or Report()
    )
    parts = _chunks(rows, axis)
    for _ in range(crf.iterations if len(neighbors.steps) else 0):
        parts = field.iterated(parts)
    return _overlapping(parts, axis)


def _chunks(rows: Rows, axis: int) -> Iterator[Part]:
    """Yield each row once, a few together, the streamed axis first; copied, since rows are views of a buffer."""
    done = 0
    for first, logits in rows:
        new = logits.movedim(axis + 1, 1)[:, done - first :]
        for chunk in torch.split(new, CHUNK_ROWS, dim=1):
            copied = chunk.clone(memory_format=torch.contiguous_format)
            yield copied, copied
        done += new.shape[1]


def _overlapping(parts: Iterator[Part], axis: int) -> Rows:
    """Yield rows as export takes them: each part begins with the last row of the one before."""
    first, last = 0, None
    for _, logits in parts:
        part = logits if last is None else torch.cat([last, logits], dim=1)
        yield first, part.movedim(1, axis + 1)
        first += part.shape[1] - 1
        last = part[:, -1:]


@dataclass(frozen=True)
class _Field:
    """An image (channels, I, J, K), streamed along its first axis, and what its voxels have for neighbors."""

    image: Tensor
    neighbors: Neighbors
    regions: bool
    report: Report

    def iterated(self, parts: Iterator[Part]) -> Iterator[Part]:
        """Yield rows after one more iteration, as soon as the rows within reach of them have come."""
        reach, rows = self.neighbors.reach[0], self.image.shape[1]
        beliefs, waiting = [], []
        first = done = known = 0
        for given, logits in parts:
            with self.report.stage("crf"):
                beliefs.append(self._beliefs(logits))
                waiting.append(given)
                known += given.shape[1]
                stop = known if known == rows else max(done, known - reach)
                if stop == done:
                    continue
                held, unary = torch.cat(beliefs, dim=1), torch.cat(waiting, dim=1)
                ready = unary[:, : stop - done]
                pulled = self._pulled(ready, held, first, done)
            yield ready, pulled
            keep = max(0, stop - reach)
            beliefs, waiting = [held[:, keep - first :]], [unary[:, stop - done :]]
            first, done = keep, stop

    def _beliefs(self, logits: Tensor) -> Tensor:
        """Return what neighbors pull by: probabilities, or for regions, which are or are not there, -1 to 1."""
        return (logits / 2).tanh() if self.regions else logits.softmax(dim=0)

    def _pulled(self, unary: Tensor, beliefs: Tensor, first: int, row: int) -> Tensor:
        """Return logits of the rows from `row` on: their `unary` ones and the pull of `beliefs`, rows from `first`."""
        result = unary.clone()
        size = BLOCK_VOXELS.get(unary.device.type, WIDE_BLOCK_VOXELS)
        for box in _blocks(unary.shape[1:], size):
            inside: tuple[Any, ...] = (*[slice(start, stop) for start, stop in box],)
            open_classes = self._open(unary[:, *inside])
            if len(open_classes) > (not self.regions):
                near = ((box[0][0] + row, box[0][1] + row), *box[1:])
                pull = self._pull(_padded(beliefs, first, near, self.neighbors.reach)[open_classes], near)
                result[open_classes, *inside] += pull
        return result

    def _open(self, unary: Tensor) -> Tensor:
        """Return the outputs that neighbors can change in a block; the others stay as they are."""
        certain = self.neighbors.strength + NEGLIGIBLE
        lead = unary.abs() if self.regions else unary.amax(dim=0) - unary
        return (lead < certain).flatten(1).any(dim=1).nonzero()[:, 0]

    def _pull(self, beliefs: Tensor, box: Box) -> Tensor:
        """Return what the neighbors of a block add to its logits; `beliefs` are those of the block and its reach."""
        reach, sizes = self.neighbors.reach, [stop - start for start, stop in box]
        image = _padded(self.image, 0, box, reach).to(beliefs.device) * self.neighbors.per_unit
        center = image[:, *(slice(step, step + size) for step, size in zip(reach, sizes, strict=True))]
        pull = beliefs.new_zeros((len(beliefs), *sizes))
        for steps, appearance, smoothness in zip(
            self.neighbors.steps.tolist(), self.neighbors.appearance, self.neighbors.smoothness, strict=True
        ):
            there = [slice(r + s, r + s + size) for r, s, size in zip(reach, steps, sizes, strict=True)]
            difference = image[:, *there] - center
            alike = difference.square_().sum(dim=0).neg_().exp_()
            pull.addcmul_(beliefs[:, *there], alike.mul_(float(appearance)).add_(float(smoothness)))
        return pull


def _blocks(shape: Sequence[int], voxels: int) -> Iterator[Box]:
    """Yield boxes that make up a shape (I, J, K), all of its rows in each, of about so many voxels."""
    deep = min(shape[2], max(1, voxels // shape[0]), 64)
    wide = max(1, voxels // (shape[0] * deep))
    for j, k in product(range(0, shape[1], wide), range(0, shape[2], deep)):
        yield (0, shape[0]), (j, min(j + wide, shape[1])), (k, min(k + deep, shape[2]))


def _padded(rows: Tensor, first: int, box: Box, reach: Sequence[int]) -> Tensor:
    """Return a box and what is within reach of it, of rows that begin with `first`; beyond the image all is 0."""
    result = rows.new_zeros(
        (len(rows), *(stop - start + 2 * step for (start, stop), step in zip(box, reach, strict=True)))
    )
    source, target = [], []
    for (start, stop), step, size, begin in zip(box, reach, rows.shape[1:], (first, 0, 0), strict=True):
        low, high = max(start - step, begin), min(stop + step, begin + size)
        source.append(slice(low - begin, high - begin))
        target.append(slice(low - start + step, high - start + step))
    result[:, *target] = rows[:, *source]
    return result
