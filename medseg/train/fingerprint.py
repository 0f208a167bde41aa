"""What a dataset looks like, in numbers: all that the planner needs to know of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from medseg.errors import DatasetError, MedsegError
from medseg.io import load
from medseg.labels import Label
from medseg.model.stored import Stored
from medseg.train.dataset import Case, Dataset
from medseg.volume import Volume

SAMPLES_PER_CASE = 10_000
"""Labelled voxels whose intensities are looked at in each case; every case counts the same, large or small."""

Progress = Callable[[int, int], None]


class CaseFacts(BaseModel):
    """One case in canonical orientation (RAS): its shape, spacing, share of voxels that are not 0, and label counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    nonzero: float
    label_voxels: dict[int, int]


class Intensities(BaseModel):
    """Intensities of the labelled voxels of all cases, in one channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


class Fingerprint(Stored):
    """A dataset in numbers."""

    what = "fingerprint"

    format: int = 1
    name: str
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    cases: tuple[CaseFacts, ...]
    intensities: tuple[Intensities, ...]


def fingerprint(dataset: Dataset, *, progress: Progress | None = None) -> Fingerprint:
    """Return the fingerprint of a dataset; reads every image and label once.

    Raises DatasetError that lists every case with files that cannot be read, grids that differ, unknown label values,
    voxels that are NaN or infinite, no label at all, or the image of another case.
    """
    facts: list[CaseFacts] = []
    samples: list[NDArray[np.float32]] = []
    problems: list[str] = []
    images: dict[str, str] = {}
    with ThreadPoolExecutor() as pool:
        for done, (case, result) in enumerate(
            zip(dataset, pool.map(lambda c: _look(c, dataset), dataset), strict=True), 1
        ):
            if isinstance(result, str):
                problems.append(f"{case.name}: {result}")
            else:
                facts.append(result[0])
                samples.append(result[1])
                twin = images.setdefault(result[2], case.name)
                if twin != case.name:
                    problems.append(f"{case.name}: the image is the same as that of {twin}")
            if progress:
                progress(done, len(dataset))
    if not problems and not any(part.size for part in samples):
        problems.append("no case has a labelled voxel")
    if problems:
        raise DatasetError(f"The dataset has {len(problems)} problem(s): " + "\n".join(problems), reason="cases")
    pooled = np.concatenate(samples, axis=1)
    return Fingerprint(
        name=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        cases=tuple(facts),
        intensities=tuple(_intensities(channel) for channel in pooled),
    )


def read_case(case: Case) -> tuple[Volume, Volume]:
    """Return the (image, labels) of a case, on one grid. Raises DatasetError where their grids differ."""
    image, labels = load(case.images if len(case.images) > 1 else case.images[0]), load(case.label)
    if not image.grid.matches(labels.grid):
        raise DatasetError(
            f"Image and labels lie on different grids: shape {image.grid.shape} against {labels.grid.shape}, spacing "
            f"{_rounded(image.grid.spacing_mm)} against {_rounded(labels.grid.spacing_mm)} mm. Resample one of them.",
            path=case.label,
            reason="grid",
        )
    return image, labels


def _look(case: Case, dataset: Dataset) -> tuple[CaseFacts, NDArray[np.float32], str] | str:
    """Return the facts of a case, samples of its intensities and a hash of its voxels, or what is wrong with it."""
    try:
        image, labels = read_case(case)
    except MedsegError as error:
        return str(error)
    values, counts = np.unique(labels.array, return_counts=True)
    unknown = sorted(set(values.tolist()) - {0, *(label.value for label in dataset.labels)})
    if unknown:
        return f"label values {unknown[:5]} are not in dataset.json"
    undrawn = sorted(case.undrawn & set(values.tolist()))
    if undrawn:
        return f"label values {undrawn[:5]} are there, but cases.json says that they were not drawn"
    if len(image.array) != len(dataset.channels):
        return f"{len(image.array)} channel(s) where dataset.json names {len(dataset.channels)}"
    if not np.isfinite(image.array.sum(dtype=np.float64)):
        return "the image has voxels that are NaN or infinite"
    canonical = image.grid.reoriented("RAS")
    facts = CaseFacts(
        name=case.name,
        shape=canonical.shape,
        spacing_mm=canonical.spacing_mm,
        nonzero=float((image.array != 0).any(axis=0).mean()),
        label_voxels={int(value): int(count) for value, count in zip(values, counts, strict=True) if value != 0},
    )
    voxels = hashlib.sha256(np.ascontiguousarray(image.array).data).hexdigest()
    return facts, _sample(image, labels), voxels


def _sample(image: Volume, labels: Volume) -> NDArray[np.float32]:
    places = np.flatnonzero(labels.array[0])
    if not places.size:
        return np.empty((len(image.array), 0), np.float32)
    # With replacement, so that each case weighs the same; a fixed seed, so that a fingerprint can be made again.
    chosen = np.random.default_rng(1234).choice(places, SAMPLES_PER_CASE)
    return np.stack([channel.ravel()[chosen] for channel in image.array]).astype(np.float32)


def _intensities(values: NDArray[np.float32]) -> Intensities:
    low, high = np.percentile(values, (0.5, 99.5))
    return Intensities(
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
    )


def _rounded(spacing_mm: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(length, 4) for length in spacing_mm)
