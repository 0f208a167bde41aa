"""How sure a model is, on the source grid: probabilities, their entropy, and the volumes that they add up to."""

from __future__ import annotations

import math
import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import OutputError
from medseg.model.stream import Index, Piece
from medseg.volume import Grid, Volume

if TYPE_CHECKING:
    from torch import Tensor


class SoftMaps:
    """What `Model.segment` says beside labels, where it is given one of these to fill.

    `probabilities` is a Volume (outputs, I, J, K), float32: the softmax of the logits that were interpolated onto the
    image's grid, background first; for regions, which may overlap, their sigmoids. `uncertainty` is a Volume
    (1, I, J, K): the entropy of the probabilities at a voxel as a share of the largest there can be, 0 for certain and
    1 for no idea; for regions that of the least certain. Each is None where it was not asked for. `volumes_ml` sums
    the probabilities of each output, so that a voxel counts by its share.

    Maps are filled as the window streams. With `folder` they lie in a file there that has no name and goes with the
    process, so that they may be larger than memory.
    """

    def __init__(
        self, *, probabilities: bool = False, uncertainty: bool = False, folder: str | PathLike[str] | None = None
    ):
        self.probabilities: Volume | None = None
        self.uncertainty: Volume | None = None
        self.volumes_ml: tuple[float, ...] = ()
        self._wanted = probabilities, uncertainty
        self._folder = folder
        self._regions = False

    def begin(self, grid: Grid, outputs: int, box: Index, *, regions: bool, activated: bool = False) -> None:
        """Make the maps of an image on `grid`; pieces lie within `box`, beyond which all is background, and certain.

        With `activated` scores are probabilities already; those of regions minus one half.
        """
        probabilities, uncertainty = self._wanted
        self._regions, self._box, self._activated = regions, box, activated
        self._voxel_ml = grid.voxel_mm3 / 1000
        self._sums = np.zeros(outputs)
        self.probabilities = self._empty(outputs, grid) if probabilities else None
        self.uncertainty = self._empty(1, grid) if uncertainty else None
        if not regions:
            inside = math.prod(len(range(size)[part]) for size, part in zip(grid.shape, box, strict=True))
            self._sums[0] = math.prod(grid.shape) - inside
            if self.probabilities is not None and self._sums[0]:
                self.probabilities.array[0] = 1

    def take(self, piece: Piece) -> None:
        """Add the voxels of a piece."""
        for index, given in piece.scores():
            scores = _logits(given, regions=self._regions) if self._activated else given
            probabilities, entropy = _sigmoid(scores) if self._regions else _softmax(scores)
            self._sums += probabilities.flatten(1).sum(dim=1).double().cpu().numpy()
            if self.probabilities is not None:
                self.probabilities.array[(slice(None), *self._box)][(slice(None), *index)] = probabilities.cpu().numpy()
            if self.uncertainty is not None:
                self.uncertainty.array[(0, *self._box)][index] = entropy.cpu().numpy()
        self.volumes_ml = tuple((self._sums * self._voxel_ml).tolist())

    def _empty(self, channels: int, grid: Grid) -> Volume:
        # As files have it, each channel on its own and the first axis quickest: written in one go.
        shape = (channels, *reversed(grid.shape))
        array = np.zeros(shape, np.float32) if self._folder is None else _mapped(shape, Path(self._folder))
        return Volume(array.transpose(0, 3, 2, 1), grid)


def _mapped(shape: tuple[int, ...], folder: Path) -> NDArray[np.float32]:
    """Return zeros in a file without a name. Raises OutputError where the folder is missing or has no room."""
    try:
        with tempfile.TemporaryFile(dir=folder) as nameless:
            # Room is taken at once: a disk that is full later would end the process without a word.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(nameless.fileno(), 0, 4 * math.prod(shape))
            return np.memmap(nameless, np.float32, mode="w+", shape=shape)
    except OSError as error:
        raise OutputError(
            f"There is no place for probabilities beside the output: {error.strerror}. Check that the folder exists "
            "and that the disk has room for a number for each voxel and label.",
            path=folder,
            reason="no_room",
        ) from error


def _logits(probabilities: Tensor, *, regions: bool) -> Tensor:
    return (probabilities + 0.5).logit(eps=1e-7) if regions else probabilities.clamp(min=1e-30).log()


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    logarithms = scores.log_softmax(dim=0)
    probabilities = logarithms.exp()
    # What underflows has no share in the entropy.
    entropy = -(probabilities * logarithms).sum(dim=0) / math.log(max(2, len(scores)))
    return probabilities, entropy.clamp(0, 1)


def _sigmoid(scores: Tensor) -> tuple[Tensor, Tensor]:
    from torch import xlogy

    share = scores.sigmoid()
    entropy = -(xlogy(share, share) + xlogy(1 - share, 1 - share)) / math.log(2)
    return share, entropy.amax(dim=0)
