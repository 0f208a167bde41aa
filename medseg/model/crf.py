"""A conditional random field (CRF) that sharpens boundaries: its settings and neighbors; `mean_field` solves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medseg.errors import UsageError

MOST_NEIGHBORS = 2**15
"""Neighbors that a voxel may have: more come of a wrong unit, or would take hours."""

Weight = Annotated[float, Field(ge=0, le=100)]
Width = Annotated[float, Field(ge=1e-3, le=1e3)]


class CRF(BaseModel):
    """A dense CRF over the voxels of the network's grid, solved by mean field in `iterations` steps.

    Voxels within `reach_mm` of each other draw each other to one label. The pull falls as a Gaussian of their distance,
    with the standard deviation `smoothness_mm`; that of appearance falls with distance (`appearance_mm`) and with the
    difference of their intensities, as the network sees them (`appearance_intensity`, all channels together).
    `appearance` and `smoothness` are weights: what all neighbors together add to the log-odds of their label where they
    agree and, for appearance, look alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    iterations: int = Field(default=5, ge=1, le=50)
    appearance: Weight = 3.0
    appearance_mm: Width = 3.0
    appearance_intensity: Width = 0.3
    smoothness: Weight = 1.0
    smoothness_mm: Width = 1.0
    reach_mm: Width = 6.0


def chosen_crf(own: CRF | None, wanted: CRF | bool | None) -> CRF | None:
    """Return the CRF to use for a model with its `own`: by default that, False for none, True for that or the usual."""
    if isinstance(wanted, CRF):
        return wanted
    return own or CRF() if wanted else None if wanted is False else own


@dataclass(frozen=True)
class Neighbors:
    """The neighbors of a voxel: steps to them (n, 3), and the pull of each by appearance and by distance alone.

    The pulls of all of them add up to the weights of the CRF. `reach` is the largest step along each axis, `per_unit`
    what intensities are multiplied by, so that a Gaussian is exp(-difference ** 2).
    """

    steps: NDArray[np.intp]
    appearance: NDArray[np.float64]
    smoothness: NDArray[np.float64]
    reach: tuple[int, ...]
    per_unit: float

    @classmethod
    def of(cls, crf: CRF, spacing_mm: Sequence[float]) -> Neighbors:
        """Return the neighbors on a grid of this spacing. Raises UsageError where they are too many."""
        reach = tuple(int(crf.reach_mm / spacing + 1e-6) for spacing in spacing_mm)
        count = math.prod(2 * step + 1 for step in reach)
        if count > MOST_NEIGHBORS:
            raise UsageError(
                f"The box of reach_mm {crf.reach_mm:g} around a voxel has {count} voxels at the spacing of the model, "
                f"and {MOST_NEIGHBORS} are the most. Give the CRF a smaller reach_mm."
            )
        steps = np.array(list(product(*(range(-step, step + 1) for step in reach))))
        distances_mm = np.linalg.norm(steps * np.asarray(spacing_mm), axis=1)
        near = (distances_mm > 0) & (distances_mm <= crf.reach_mm * (1 + 1e-6))
        appearance, smoothness = (
            weight * _shares(distances_mm[near], width_mm)
            for weight, width_mm in ((crf.appearance, crf.appearance_mm), (crf.smoothness, crf.smoothness_mm))
        )
        return cls(steps[near], appearance, smoothness, reach, 1 / (crf.appearance_intensity * math.sqrt(2)))

    @property
    def strength(self) -> float:
        """What all neighbors together can add to the log-odds of a class."""
        return float(self.appearance.sum() + self.smoothness.sum())


def _shares(distances_mm: NDArray[np.float64], width_mm: float) -> NDArray[np.float64]:
    """Return a Gaussian of distances, with a sum of 1."""
    exponents = -0.5 * (distances_mm / width_mm) ** 2
    shares = np.exp(exponents - exponents.max(initial=-np.inf))
    return np.asarray(shares / shares.sum())
