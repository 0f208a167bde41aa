"""Cases as the network sees them, prepared once and read back as memory maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.io.files import written_whole
from medseg.model.plan import Plan
from medseg.model.preprocess import prepare
from medseg.process.resample import resample_labels
from medseg.train.dataset import Case
from medseg.train.fingerprint import read_case

PLACES_PER_CLASS = 10_000
"""Labelled voxels of each class that a case remembers, to center patches on."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A case on its network grid: image (C, I, J, K) float32, channel numbers (I, J, K), voxels to center patches on.

    `places` maps each class that occurs to voxel indices (N, 3) of it.
    """

    name: str
    image: NDArray[np.float32]
    target: NDArray[np.uint16]
    places: dict[int, NDArray[np.int32]]


def prepare_cases(
    cases: Sequence[Case], plan: Plan, folder: Path, *, progress: Progress | None = None
) -> list[Prepared]:
    """Return all cases prepared, from `folder` where they are there already.

    Their files are named by a hash of the plan's preprocessing and of the sizes and times of the source files, so that
    a changed case or plan is prepared anew. Raises DatasetError or InputError where a case cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepared = []
    with ThreadPoolExecutor() as pool:
        for done, case in enumerate(pool.map(lambda case: _prepared(case, plan, folder), cases), 1):
            prepared.append(case)
            if progress:
                progress(done, len(cases))
    return prepared


def _prepared(case: Case, plan: Plan, folder: Path) -> Prepared:
    stem = folder / _key(case, plan)
    files = {part: stem.with_name(f"{stem.name}.{part}.npy") for part in ("image", "target", "places")}
    if not all(file.is_file() for file in files.values()):
        for part, array in _arrays(case, plan).items():
            with written_whole(files[part]) as beside, beside.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
    image, target, places = (np.load(files[part], mmap_mode="r") for part in ("image", "target", "places"))
    return Prepared(case.name, image, target, {int(c): places[places[:, 0] == c, 1:] for c in np.unique(places[:, 0])})


def _arrays(case: Case, plan: Plan) -> dict[str, NDArray[np.generic]]:
    image, labels = read_case(case)
    prepared = prepare(image, plan)
    values = resample_labels(labels, prepared.grid).array[0]
    target = np.zeros(values.shape, np.uint16)
    places = [np.empty((0, 4), np.int32)]
    for channel, label in enumerate(plan.labels, start=1):
        target[values == label.value] = channel
        where = np.argwhere(values == label.value).astype(np.int32)
        keep = np.linspace(0, len(where) - 1, min(len(where), PLACES_PER_CLASS)).astype(int)
        places.append(np.insert(where[keep], 0, channel, axis=1))
    return {"image": prepared.array, "target": target, "places": np.concatenate(places)}


def _key(case: Case, plan: Plan) -> str:
    steps = plan.model_dump(mode="json", exclude={"name", "patch", "mirror_axes", "network"})
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in (*case.images, case.label)]
    return hashlib.sha256(json.dumps([steps, files], sort_keys=True).encode()).hexdigest()[:24]
