"""Training patches, each a function of (seed, step, sample) alone: never of what ran before or beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grid_sample

from medseg.errors import DatasetError
from medseg.model.plan import Plan
from medseg.train.cache import Chunks, Prepared
from medseg.train.dataset_json import values_of
from medseg.train.loss import IGNORED

ROTATION_SHARE, ROTATION_DEGREES = 0.15, 30.0
SCALING_SHARE, SCALING_RANGE = 0.15, (0.7, 1.4)
"""How often a patch is turned about each axis, and scaled, and by how much; ranges as in nnU-Net, shares by search."""

Generator = np.random.Generator


class Batch(NamedTuple):
    """Images (B, C, I, J, K), class numbers (B, 1, I, J, K), which outputs (B, outputs) were drawn, and seeds (B).

    For regions, which may overlap, the numbers are (B, outputs, I, J, K): 1 inside, 0 outside, IGNORED.
    """

    images: torch.Tensor
    target: torch.Tensor
    known: torch.Tensor
    seeds: torch.Tensor


@dataclass(frozen=True)
class Sampler:
    """Draws patches of the plan's size from prepared cases."""

    cases: Sequence[Prepared]
    plan: Plan
    seed: int
    foreground: float

    def batch(self, step: int, samples: Iterable[int]) -> Batch:
        """Return some of the patches of a step."""
        parts = [self.patch(step, sample) for sample in samples]
        return Batch(*(torch.stack(part) for part in zip(*parts, strict=True)))

    def patch(self, step: int, sample: int) -> Batch:
        """Return one patch, without the first axis of a batch, turned, scaled and mirrored at random.

        Raises DatasetError that names the case where its prepared files cannot be read.
        """
        random = np.random.default_rng([self.seed, step, sample])
        number, case = self._asked(random)
        try:
            return self._drawn(case, number, random)
        except Exception as error:  # whatever it is, it must be known which case it was
            raise DatasetError(
                f"No patch could be drawn from {case.name}: {type(error).__name__}. Delete the cache of the model and "
                "start again; if that does not help, look at this case.",
                reason="case",
            ) from error

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

    def _drawn(self, case: Prepared, number: int, random: Generator) -> Batch:
        center = self._center(case, number, random)
        matrix = self._warp(random)
        patch = np.asarray(self.plan.patch)
        # What the turned patch touches, with a voxel to spare for interpolation.
        reach = np.ceil(np.abs(matrix) @ ((patch - 1) / 2) + 1).astype(int)
        start = np.floor(center).astype(int) - reach
        stop = np.ceil(center).astype(int) + reach + 1
        image = torch.from_numpy(_cut(case.image, start, stop))
        target = torch.from_numpy(_cut(case.target, start, stop).astype(np.float32)[None])
        grid = _sampling_grid(matrix, center - start, patch, stop - start)
        image = grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0]
        target = grid_sample(target[None], grid, mode="nearest", padding_mode="border", align_corners=True)[0]
        seed = torch.tensor(int(random.integers(2**62)))
        return Batch(image, in_outputs(target.long(), self.plan), torch.from_numpy(case.known), seed)

    def _center(self, case: Prepared, number: int, random: Generator) -> NDArray[np.float64]:
        size, patch = np.asarray(case.target.shape), np.asarray(self.plan.patch)
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
    return torch.where(numbers < 0, IGNORED, inside[:, numbers[0].clamp(min=0)])


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    matrix = np.eye(3)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def _cut(array: Chunks | NDArray[Any], start: NDArray[np.int_], stop: NDArray[np.int_]) -> NDArray[Any]:
    """Return (..., I, J, K) from start to stop along the last three axes, 0 where that leaves the array."""
    ahead, size = array.shape[:-3], np.asarray(array.shape[-3:])
    first, last = np.clip(start, 0, size), np.clip(stop, 0, size)
    result = np.zeros((*ahead, *(stop - start)), array.dtype)
    inner = [slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True)]
    outer = [slice(a, b) for a, b in zip(first, last, strict=True)]
    result[..., inner[0], inner[1], inner[2]] = array[..., outer[0], outer[1], outer[2]]
    return result


def _sampling_grid(
    matrix: NDArray[np.float64], center: NDArray[np.float64], patch: NDArray[np.int_], size: NDArray[np.int_]
) -> torch.Tensor:
    # grid_sample counts each axis from -1 to 1 between the outer voxel centers, and names the last axis first.
    scale = 2 / (size - 1)
    offset = center * scale - 1
    rows = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in patch.tolist()]
    steps = torch.from_numpy((matrix * scale[:, None]).astype(np.float32))
    parts = [
        steps[axis, 0] * rows[0][:, None, None]
        + steps[axis, 1] * rows[1][:, None]
        + steps[axis, 2] * rows[2]
        + offset[axis]
        for axis in (2, 1, 0)
    ]
    return torch.stack(parts, dim=-1)[None].float()
