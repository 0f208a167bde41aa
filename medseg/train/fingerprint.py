"""What a dataset looks like, in numbers: all that the planner needs to know of it."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from medseg.labels import Label, label_map
from medseg.model.intended import Range, Seen
from medseg.model.plan import Length, Region
from medseg.model.stored import Stored
from medseg.networks.monai_kinds import Count
from medseg.process.measured import box_around, measured
from medseg.train.check import Findings, check_case, check_together, unseen
from medseg.train.dataset import Case, Dataset, refuse
from medseg.train.parallel import Progress, side_by_side
from medseg.train.sides import LabelPlace, places_of
from medseg.volume import Volume

SAMPLES_PER_CASE = 10_000
"""Labelled voxels whose intensities are looked at in each case; every case counts the same, large or small."""


class CaseFacts(BaseModel):
    """One case in canonical orientation (RAS): its shape, spacing, what of it was measured, and label counts.

    `box` is the shape of the smallest box around the voxels that were measured in some channel (`process.measured`),
    `measured` their share of the whole image (older files call it `nonzero`). `label_voxels` counts the values of the
    label file, but for 0 and what is to be ignored; `label_places` says where each lies (nothing in files of older
    versions).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Count, Count, Count]
    spacing_mm: tuple[Length, Length, Length]
    box: tuple[Count, Count, Count]
    measured: float = Field(ge=0, le=1, validation_alias=AliasChoices("measured", "nonzero"))
    label_voxels: dict[int, Annotated[int, Field(ge=0, le=2**53)]]
    label_places: dict[int, LabelPlace] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_name(cls, fields: Any) -> Any:
        """Drop the names of cases, often those of patients, that older fingerprints hold: a fingerprint is shared."""
        return {name: value for name, value in fields.items() if name != "name"} if isinstance(fields, dict) else fields


class Intensities(BaseModel):
    """Intensities of the labelled voxels of all cases, in one channel."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


class Fingerprint(Stored):
    """A dataset in numbers, without the names of its cases: `names_sha256` tells whether others are the same.

    `seen` is what a model in use is compared with.
    """

    what = "fingerprint"

    format: int = 1
    name: str
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    regions: tuple[Region, ...] = ()
    names_sha256: str = ""
    cases: tuple[CaseFacts, ...]
    intensities: tuple[Intensities, ...]
    seen: Seen | None = None


def fingerprint(dataset: Dataset, *, progress: Progress | None = None) -> Fingerprint:
    """Return the fingerprint of a dataset; reads every image and label once.

    Raises DatasetError that lists everything wrong with every case: files that are missing or cannot be read, grids
    that differ, label values that are unknown or were said not to be drawn, voxels that are NaN or infinite, nothing
    but voxels to be ignored, the image or the labels of another case. What is odd but may be meant is a warning: cases
    without a labelled voxel, constant images, labels that no case has.
    """
    facts: dict[str, CaseFacts] = {}
    samples: list[NDArray[np.float32]] = []
    found: list[tuple[Case, Findings]] = []
    looks = side_by_side(lambda case: _look(case, dataset), dataset.cases, progress)
    for case, (findings, fact, sample) in looks:
        found.append((case, findings))
        if fact is not None and sample is not None:
            facts[case.name] = fact
            samples.append(sample)
    problems = [f"{case.name}: {problem}" for case, findings in found for problem in findings.problems]
    problems += check_together(found)
    if not problems and not any(part.size for part in samples):
        problems.append("no case has a labelled voxel")
    refuse(problems)
    _warn(found, unseen([fact.label_voxels for fact in facts.values()], dataset))
    pooled = np.concatenate(samples, axis=1)
    return Fingerprint(
        name=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        regions=dataset.meaning.regions,
        names_sha256=names_digest(dataset),
        cases=tuple(facts.values()),
        intensities=tuple(_intensities(channel) for channel in pooled),
        seen=what_was_seen(dataset, [facts[case.name] for case in dataset.cases]),
    )


def names_digest(dataset: Dataset) -> str:
    """Return a SHA-256 of the names of all cases together: it tells whether they are the same, and not which."""
    return hashlib.sha256("\n".join(case.name for case in dataset.cases).encode("utf-8", "surrogateescape")).hexdigest()


def what_was_seen(dataset: Dataset, facts: Sequence[CaseFacts]) -> Seen:
    """Return fields of view and volumes, from the smallest to the largest; a label counts where it was drawn."""
    views = np.array([np.multiply(fact.shape, fact.spacing_mm) for fact in facts])
    volumes = {}
    for label in dataset.labels:
        drawn = [fact for case, fact in zip(dataset.cases, facts, strict=True) if label.value not in case.undrawn]
        found = [
            fact.label_voxels[label.value] * math.prod(fact.spacing_mm) / 1000
            for fact in drawn
            if fact.label_voxels.get(label.value)
        ]
        if found:
            always = len(found) == len(drawn)
            volumes[label.value] = Range(smallest=min(found), largest=max(found), always=always)
    return Seen(
        smallest_view_mm=_lengths(views.min(axis=0)), largest_view_mm=_lengths(views.max(axis=0)), volumes_ml=volumes
    )


def _lengths(lengths_mm: NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = np.round(lengths_mm, 3).tolist()
    return a, b, c


def _look(case: Case, dataset: Dataset) -> tuple[Findings, CaseFacts | None, NDArray[np.float32] | None]:
    """Return what is found in a case and, where nothing is wrong, its facts and samples of its intensities."""
    findings, image, labels = check_case(case, dataset)
    if findings.problems or image is None or labels is None:
        return findings, None, None
    values = label_map(labels)
    numbers, counts = np.unique(values, return_counts=True)
    canonical = image.grid.reoriented("RAS")
    masks = [measured(channel) for channel in image.array]
    inside = image.grid.cropped(*box_around(masks, image.grid.shape))
    share = float(
        np.mean(np.any([np.broadcast_to(True if mask is None else mask, values.shape) for mask in masks], axis=0))
    )
    voxels = {int(number): int(count) for number, count in zip(numbers, counts, strict=True)}
    facts = CaseFacts(
        shape=canonical.shape,
        spacing_mm=canonical.spacing_mm,
        box=inside.reoriented("RAS").shape,
        measured=share,
        label_voxels={number: count for number, count in voxels.items() if number not in {0, case.ignore}},
        label_places=places_of(values, image.grid, dataset.meaning.members),
    )
    marked = values != 0 if case.ignore is None else (values != 0) & (values != case.ignore)
    for mask in masks:
        if mask is not None and (marked & mask).any():
            marked &= mask
    return findings, facts, _sample(image, np.flatnonzero(marked))


def _warn(found: Sequence[tuple[Case, Findings]], unseen_labels: Sequence[str]) -> None:
    """Warn once of each kind of what is odd."""
    kinds: dict[str, list[str]] = {}
    for case, findings in found:
        for oddity in findings.oddities:
            kinds.setdefault(oddity, []).append(case.name)
    lines = [f"{len(names)} case(s) have {kind}: {', '.join(names[:10])}" for kind, names in kinds.items()]
    if unseen_labels:
        lines.append(f"{len(unseen_labels)} label(s) are in no case: {', '.join(unseen_labels[:10])}")
    if lines:
        warnings.warn(f"The dataset can be trained on, but look at this: {'; '.join(lines)}.", stacklevel=3)


def _sample(image: Volume, places: NDArray[np.intp]) -> NDArray[np.float32]:
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
