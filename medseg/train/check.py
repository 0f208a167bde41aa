"""What is wrong with the cases of a dataset, found before hours are spent on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, MedsegError
from medseg.io import load, read_grid
from medseg.labels import label_map
from medseg.process.channels import WHOLE, covered
from medseg.train.dataset import Case, Dataset, missing_files
from medseg.volume import Volume


@dataclass
class Findings:
    """What one case is like: what is wrong with it, what is odd, and hashes by which it is known again.

    `problems` forbid a training, `oddities` do not. A label map without a labelled voxel has no hash.
    """

    problems: list[str] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    image_hash: str = ""
    label_hash: str = ""


def read_image(case: Case) -> Volume:
    """Return the image of a case with all its channels."""
    return load(case.images) if len(case.images) > 1 else load(case.images[0], channels=case.channels)


def read_case(case: Case) -> tuple[Volume, Volume]:
    """Return the (image, labels) of a case, on one grid. Raises DatasetError where their grids differ."""
    image, labels = read_image(case), load(case.label)
    if not image.grid.matches(labels.grid):
        raise DatasetError(
            f"Image and labels lie on different grids: shape {image.grid.shape} against {labels.grid.shape}, spacing "
            f"{_rounded(image.grid.spacing_mm)} against {_rounded(labels.grid.spacing_mm)} mm"
            f"{_apart(image, labels)}. Resample one of them.",
            path=case.label,
            reason="grid",
        )
    return image, labels


def check_case(case: Case, dataset: Dataset) -> tuple[Findings, Volume | None, Volume | None]:
    """Return what is found in a case, and its image and labels where they can be read."""
    absent = missing_files(case)
    if absent:
        return Findings(absent), None, None
    try:
        image, labels = read_case(case)
        values = label_map(labels)
    except MedsegError as error:
        part = next((f"{part}: " for part, file in case.files if file == error.path and error.reason != "grid"), "")
        return Findings([f"{part}{error}"]), None, None
    found = Findings()
    _check_image(image, dataset, found)
    if any(covered(image.grid, read_grid(file)) < WHOLE for file in case.images[1:]):
        found.oddities.append("a channel that covers a part of the first alone, and is filled up")
    _check_labels(values, case, dataset, found)
    return found, image, labels


def check_together(found: Sequence[tuple[Case, Findings]]) -> list[str]:
    """Return a line for every image or label map that is there under two names.

    Labels may be shared by several images of one group: a patient's T1 and T2, drawn once.
    """
    lines: list[str] = []
    images: dict[str, Case] = {}
    labels: dict[str, Case] = {}
    for case, findings in found:
        twin = images.setdefault(findings.image_hash or case.name, case)
        if twin is not case:
            lines.append(f"{case.name}: the image is the same as that of {twin.name}")
            continue
        twin = labels.setdefault(findings.label_hash or case.name, case)
        if twin is not case and not (case.group and case.group == twin.group):
            lines.append(f"{case.name}: the labels are the same as those of {twin.name}")
    return lines


def unseen(counts: Iterable[dict[int, int]], dataset: Dataset) -> list[str]:
    """Return the names of labels that no case has, from the voxel counts of the cases."""
    there = {value for case in counts for value, count in case.items() if count}
    members = dataset.meaning.members
    return [label.name for label in dataset.labels if not there & set(members[label.value])]


def _check_image(image: Volume, dataset: Dataset, found: Findings) -> None:
    if len(image.array) != len(dataset.channels):
        found.problems.append(f"{len(image.array)} channel(s) where dataset.json names {len(dataset.channels)}")
    if not np.isfinite(image.array.sum(dtype=np.float64)):
        found.problems.append("the image has voxels that are NaN or infinite")
    elif any(channel.min() == channel.max() for channel in image.array):
        found.oddities.append("an image that is constant")
    found.image_hash = _hash(image.array)


def _check_labels(values: NDArray[np.integer], case: Case, dataset: Dataset, found: Findings) -> None:
    there = set(np.unique(values).tolist())
    marked = there - {0, case.ignore}
    unknown = sorted(marked - set(dataset.meaning.values))
    if unknown:
        found.problems.append(f"label values {unknown[:5]} are not in dataset.json")
    members = dataset.meaning.members
    drawn = {one for value in members if value not in case.undrawn for one in members[value]}
    undrawn = sorted(marked - set(unknown) - drawn)
    if undrawn:
        found.problems.append(f"label values {undrawn[:5]} are there, but cases.json says that they were not drawn")
    if there == {case.ignore}:
        found.problems.append("every voxel is to be ignored")
    elif not marked and len(case.undrawn) < len(dataset.labels):
        found.oddities.append("no labelled voxel")
    if marked:
        found.label_hash = _hash(values)


def _hash(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() + str(array.shape)


def _apart(image: Volume, labels: Volume) -> str:
    """Return how far the corners of both lie apart, where that is all that differs."""
    if image.grid.shape != labels.grid.shape:
        return ""
    last = np.asarray(image.grid.shape) - 1
    corners = np.stack(np.meshgrid(*([0, n] for n in last), indexing="ij"), axis=-1).reshape(-1, 3)
    apart = np.linalg.norm(image.grid.to_world(corners) - labels.grid.to_world(corners), axis=1).max()
    return f", corners up to {apart:.3g} mm apart"


def _rounded(spacing_mm: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(length, 4) for length in spacing_mm)
