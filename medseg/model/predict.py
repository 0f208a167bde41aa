"""From tiles to logits: the network, mirrored if asked, batched, and never twice for the same constant tile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor


class Predictor:
    """Runs a network on tiles (C, I, J, K) and remembers what it says of tiles that hold one value throughout.

    All tiles of an image have one shape and see the same padding, so two tiles of the same constant have the same
    logits: air is computed once. `ran` and `reused` count both kinds. With `mirror_axes` the logits are averaged over
    all flips along these axes. Where a GPU runs out of memory the batch is halved until it fits.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], *, mirror_axes: Sequence[int] = (), reuse: bool = True, batch: int = 1
    ):
        self.run = run
        self.flips = [flip for count in range(len(mirror_axes) + 1) for flip in combinations(mirror_axes, count)]
        self.reuse = reuse
        self.batch = batch
        self.ran = 0
        self.reused = 0
        self._constants: dict[tuple[float, ...], Tensor] = {}

    def __call__(self, tiles: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits (outputs, I, J, K) of each tile."""
        keys = [_constant(tile) if self.reuse else None for tile in tiles]
        new = {key: place for place, key in enumerate(keys) if key is not None and key not in self._constants}
        wanted = [place for place, key in enumerate(keys) if key is None or new.get(key) == place]
        logits = dict(zip(wanted, self._in_batches([tiles[place] for place in wanted]), strict=True))
        for key, place in new.items():
            self._constants[key] = logits[place].clone()
        self.ran += len(wanted)
        self.reused += len(tiles) - len(wanted)
        return [logits[place] if key is None else self._constants[key] for place, key in enumerate(keys)]

    def _in_batches(self, tiles: Sequence[Tensor]) -> list[Tensor]:
        done: list[Tensor] = []
        while len(done) < len(tiles):
            part = tiles[len(done) : len(done) + self.batch]
            try:
                logits = self._averaged(torch.stack(list(part)))
                # A runtime may use one piece of memory for every answer.
                done.extend(logits.clone() if len(part) < len(tiles) else logits)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.batch = len(part) // 2
                warnings.warn(
                    f"The device ran out of memory; going on with {self.batch} tiles at a time.", stacklevel=2
                )
        return done

    def _averaged(self, batch: Tensor) -> Tensor:
        total = self.run(batch)
        for flip in self.flips[1:]:
            axes = [axis + 2 for axis in flip]
            total = total.clone() if flip == self.flips[1] else total
            total += self.run(batch.flip(axes)).flip(axes)
        return total / len(self.flips) if len(self.flips) > 1 else total


def _constant(tile: Tensor) -> tuple[float, ...] | None:
    """Return the value of each channel where a tile holds one value throughout, else None."""
    low, high = torch.aminmax(tile.reshape(len(tile), -1), dim=1)
    return tuple(low.tolist()) if torch.equal(low, high) else None
