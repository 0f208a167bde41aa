"""Training patches, each a function of (seed, step, sample) alone: never of what ran before or beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grid_sample

from medseg.errors import DatasetError
from medseg.model.plan import Plan
from medseg.networks.kinds import Triple
from medseg.train.cache import Chunks, Prepared
from medseg.train.dataset_json import values_of
from medseg.train.loss import IGNORED

ROTATION_SHARE, ROTATION_DEGREES = 0.15, 30.0
SCALING_SHARE, SCALING_RANGE = 0.15, (0.7, 1.4)
"""How often a patch is turned about each axis, and scaled, and by how much; ranges as in nnU-Net, shares by search."""

Generator = np.random.Generator
CPU = torch.device("cpu")


class Batch(NamedTuple):
    """Images (B, C, I, J, K), class numbers (B, 1, I, J, K), which outputs (B, outputs) were drawn, and seeds (B).

    For regions, which may overlap, the numbers are (B, outputs, I, J, K): 1 inside, 0 outside, IGNORED. `known` is None
    where all outputs were drawn in all cases. The seeds are on the CPU, of what is still to be changed at random.
    """

    images: torch.Tensor
    target: torch.Tensor
    known: torch.Tensor | None
    seeds: torch.Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """Yield batches of `size` images."""
        for first in range(0, len(self.images), size):
            part = slice(first, first + size)
            known = None if self.known is None else self.known[part]
            yield Batch(self.images[part], self.target[part], known, self.seeds[part])


class Drawn(NamedTuple):
    """A patch before anything of it is read: the voxel of a case at its center, and a matrix from its voxels' steps."""

    case: Prepared
    center: NDArray[np.float64]
    matrix: NDArray[np.float64]
    seed: int


@dataclass(frozen=True)
class Sampler:
    """Draws patches from prepared cases, of the plan's size or smaller; they are cut and turned on `device`."""

    cases: Sequence[Prepared]
    plan: Plan
    seed: int
    foreground: float
    device: torch.device = CPU

    def batch(self, step: int, samples: Iterable[int], patch: Triple | None = None) -> Batch:
        """Return some of the patches of a step: turned, scaled and mirrored at random, and not yet otherwise changed.

        They have the size `patch`, or that of the plan.
        Raises DatasetError that names the case where its prepared files cannot be read.
        """
        size = np.asarray(patch or self.plan.patch)
        drawn = [self._drawn(np.random.default_rng([self.seed, step, sample]), size) for sample in samples]
        images, target = self._turned(drawn, size)
        if self.plan.regions:
            target = torch.stack([in_outputs(one, self.plan) for one in target])
        known = None
        if not self._all_drawn:
            known = torch.from_numpy(np.stack([one.case.known for one in drawn])).to(self.device)
        return Batch(images, target, known, torch.tensor([one.seed for one in drawn]))

    @cached_property
    def _all_drawn(self) -> bool:
        return all(case.known.all() for case in self.cases)

    @cached_property
    def _owners(self) -> dict[int, list[Prepared]]:
        """Return the cases in which each class is."""
        numbers = sorted({number for case in self.cases for number in case.places if number})
        return {number: [case for case in self.cases if number in case.places] for number in numbers}

    def _asked(self, random: Generator) -> tuple[int, Prepared]:
        """Return a class to center a patch on and a case that has it; or 0, for any place, and any case.

        A class is asked for by the square root of the number of cases that have it: one that few cases have is seen
        more often than by chance, but not so often that these cases are learned by heart.
        """
        if self._owners and random.random() < self.foreground:
            weights = np.sqrt([len(owners) for owners in self._owners.values()])
            number = int(random.choice(list(self._owners), p=weights / weights.sum()))
            cases: Sequence[Prepared] = self._owners[number]
        else:
            number, cases = 0, self.cases
        return number, cases[int(random.integers(len(cases)))]

    def _drawn(self, random: Generator, patch: NDArray[np.int_]) -> Drawn:
        number, case = self._asked(random)
        with _named(case):
            center = self._center(case, number, random, patch)
        return Drawn(case, center, self._warp(random), int(random.integers(2**62)))

    def _turned(self, drawn: Sequence[Drawn], patch: NDArray[np.int_]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (B, C, I, J, K) and class numbers (B, 1, I, J, K), all turned at once."""
        # What each turned patch touches, with a voxel to spare for interpolation.
        reaches = [np.ceil(np.abs(one.matrix) @ ((patch - 1) / 2) + 1).astype(int) for one in drawn]
        starts = [np.floor(one.center).astype(int) - reach for one, reach in zip(drawn, reaches, strict=True)]
        stops = [np.ceil(one.center).astype(int) + reach + 1 for one, reach in zip(drawn, reaches, strict=True)]
        sizes = np.subtract(stops, starts)
        shape = (len(drawn), self.plan.inputs + 1, *sizes.max(axis=0).tolist())
        parts = torch.zeros(shape, device=self.device)
        for part, one, start, stop in zip(parts, drawn, starts, stops, strict=True):
            with _named(one.case):
                _cut(one.case.image, part[:-1], start, stop)
                _cut(one.case.target, part[-1], start, stop)
        centers = np.subtract([one.center for one in drawn], starts)
        grid = _sampling_grid(np.stack([one.matrix for one in drawn]), centers, patch.tolist(), parts)
        images = grid_sample(parts[:, :-1], grid, mode="bilinear", padding_mode="border", align_corners=True)
        target = grid_sample(parts[:, -1:], grid, mode="nearest", padding_mode="border", align_corners=True)
        return images, target.long()

    def _center(self, case: Prepared, number: int, random: Generator, patch: NDArray[np.int_]) -> NDArray[np.float64]:
        size = np.asarray(case.target.shape)
        # A patch stays inside the image; where it is larger, the image stays inside the patch.
        low, high = np.minimum(0, size - patch), np.maximum(0, size - patch)
        if number in case.places:  # 0 is there where voxels are ignored: any that is not
            voxels = case.places[number]
            start = np.clip(voxels[int(random.integers(len(voxels)))] - patch // 2, low, high)
        else:
            start = random.integers(low, high + 1)
        return np.asarray(start + (patch - 1) / 2)

    def _warp(self, random: Generator) -> NDArray[np.float64]:
        matrix = np.eye(3)
        for axis in range(3):
            if random.random() < ROTATION_SHARE:
                matrix = matrix @ _rotation(axis, np.deg2rad(random.uniform(-ROTATION_DEGREES, ROTATION_DEGREES)))
        if random.random() < SCALING_SHARE:
            matrix = matrix * random.uniform(*SCALING_RANGE)
        for axis in self.plan.mirror_axes:
            if random.random() < 0.5:
                matrix[:, axis] = -matrix[:, axis]
        spacing = np.asarray(self.plan.spacing_mm)
        return np.asarray(matrix * spacing / spacing[:, None])  # turned in mm, not in voxels


def in_outputs(numbers: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return class numbers (1, I, J, K) as a loss takes them: as they are, or for a plan with regions one channel each.

    A class is one value of the label files, counted from 1.
    """
    if not plan.regions:
        return numbers
    values = values_of(plan.labels, plan.regions)
    inside = torch.tensor([[0, *(value in region.members for value in values)] for region in plan.regions])
    return torch.where(numbers < 0, IGNORED, inside.to(numbers.device)[:, numbers[0].clamp(min=0)])


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    matrix = np.eye(3)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


@contextmanager
def _named(case: Prepared) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, it must be known which case it was
        raise DatasetError(
            f"No patch could be drawn from {case.name}: {type(error).__name__}. Delete the cache of the model and "
            "start again; if that does not help, look at this case.",
            reason="case",
        ) from error


def _cut(
    array: Chunks | NDArray[Any] | torch.Tensor, out: torch.Tensor, start: NDArray[np.int_], stop: NDArray[np.int_]
) -> None:
    """Put (..., I, J, K) from start to stop along the last three axes at the beginning of `out`.

    What lies outside of the array is left as it is.
    """
    size = np.asarray(array.shape[-3:])
    first, last = np.clip(start, 0, size), np.clip(stop, 0, size)
    inner: list[Any] = [slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True)]
    outer = [slice(a, b) for a, b in zip(first, last, strict=True)]
    where: Any = (*[slice(None)] * (len(array.shape) - 3), *outer)  # files know no ellipsis
    part = array[where]
    out[(..., *inner)] = part if isinstance(part, torch.Tensor) else torch.from_numpy(part)


def _sampling_grid(
    matrices: NDArray[np.float64], centers: NDArray[np.float64], patch: Sequence[int], parts: torch.Tensor
) -> torch.Tensor:
    """Return where in each of `parts` (B, C, ...) the voxels of a patch lie, (B, I, J, K, 3), for grid_sample."""
    # grid_sample counts each axis from -1 to 1 between the outer voxel centers, and names the last axis first.
    scale = 2 / (np.asarray(parts.shape[2:]) - 1)
    middle = (np.asarray(patch) - 1) / 2
    steps = matrices * scale[:, None]
    offsets = centers * scale - 1 - steps @ middle
    affine = torch.from_numpy(np.concatenate([offsets[..., None], steps], axis=2)[:, ::-1].astype(np.float32).copy())
    affine = affine.to(parts.device)[:, :, :, None, None, None]  # (B, axis, (offset, i, j, k), 1, 1, 1)
    i, j, k = (torch.arange(edge, dtype=torch.float32, device=parts.device) for edge in patch)
    grid = affine[:, :, 0] + affine[:, :, 1] * i[:, None, None] + affine[:, :, 2] * j[:, None] + affine[:, :, 3] * k
    return grid.movedim(1, -1)
