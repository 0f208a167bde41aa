"""Cases as the network sees them, prepared once and kept as compressed chunks, of which a patch unpacks its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medseg.errors import DatasetError, MedsegError, OutputError
from medseg.io.files import written_whole
from medseg.labels import label_map
from medseg.model.plan import Plan
from medseg.model.preprocess import box_to_see, prepare
from medseg.process.resample import resample_labels
from medseg.train.check import read_case
from medseg.train.dataset import Case
from medseg.train.dataset_json import members_of, values_of
from medseg.train.file_hashes import FileHashes
from medseg.train.loss import IGNORED
from medseg.train.parallel import Progress, side_by_side
from medseg.train.small_parts import keep_parts, lost_parts, warn_of_lost

PLACES_PER_CLASS = 10_000
"""Labelled voxels of each class that a case remembers, to center patches on."""

FORMAT = 4
"""Goes up when prepared cases mean something else than before; older ones are made again."""

CHUNKS, BLOCKS = 96, 32
"""Voxels along an edge, at most, of what is written and of what is unpacked as a whole, a block: it fits into a core's
own cache."""

PACKING = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1}
"""Fast to unpack (benchmarks/cache_formats.py); cases are packed side by side."""

FILES = {"image": "image.b2nd", "target": "target.b2nd", "places": "places.npy", "lost": "lost.npy"}

PREPARING = {
    "channels", "labels", "regions", "orientation", "spacing_mm", "resampling", "normalize_first", "crop_nonzero",
    "measured_only", "keep_small",
}  # fmt: skip
"""The fields of a plan that decide what a prepared case is."""


@dataclass(frozen=True)
class Chunks:
    """An array in a file, of which slices of each axis are read into memory as of numpy's arrays.

    The file is open only then: thousands of cases have more files than a process may have open.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, file: Path) -> Chunks:
        """Return the array in a file. Raises RuntimeError or ValueError for a file that is none of its kind."""
        array = _open(file)
        return cls(file, array.shape, array.dtype)

    def __getitem__(self, slices: Any) -> NDArray[Any]:
        part: NDArray[Any] = _open(self.file)[slices]
        return part


def _open(file: Path) -> blosc2.NDArray:
    # Safe: nothing in a file makes objects, runs expressions or leads to another file.
    return blosc2.open(str(file), mmap_mode="r", dparams={"nthreads": 1}, deserialize="safe")


@dataclass(frozen=True)
class Places:
    """Voxel indices (N, 3), some successive rows of a file, read one by one; the file is open only then."""

    file: Path
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return np.array(np.load(self.file, mmap_mode="r")[self.first + row, 1:])


@dataclass(frozen=True)
class Prepared:
    """A case on its network grid: image (C, I, J, K) float32, class numbers (I, J, K), voxels to center patches on.

    Classes are the values that label files mark, numbered from 1; IGNORED is where nobody looked. `places` maps each
    class that occurs to voxel indices (N, 3) of it, and 0, where something is ignored, to any that is not. `known`
    (outputs,) says which outputs were drawn, `lost` (N, 5) what resampling lost (`LostParts.row`).
    """

    name: str
    image: Chunks | NDArray[np.float32] | Tensor
    target: Chunks | NDArray[np.integer] | Tensor
    places: dict[int, Places]
    known: NDArray[np.bool_]
    lost: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 5), np.int64))


def prepare_cases(
    cases: Sequence[Case], plan: Plan, folder: Path, *, progress: Progress | None = None
) -> list[Prepared]:
    """Return all cases prepared, from `folder` where they are there already.

    Their files are named by a hash of the plan's preprocessing and of the content of the source files, so that a
    changed case or plan is prepared anew, and a copied dataset is not.
    Parts of labels that are lost on the network's grid are a warning.
    Raises DatasetError that names the case where one cannot be prepared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hashes = FileHashes(folder / "files.json")
    work = partial(_prepared, plan=plan, folder=folder, hashes=hashes)
    prepared = [result for _, result in side_by_side(work, cases, progress)]
    hashes.save()
    warn_of_lost([(one.name, one.lost) for one in prepared], plan)
    return prepared


def _prepared(case: Case, plan: Plan, folder: Path, hashes: FileHashes) -> Prepared:
    try:
        files = _files(case, plan, folder, hashes)
        image, target, places, lost = _opened(files) or _written(files, _arrays(case, plan))
    except OutputError:
        raise  # a full disk is no fault of the case
    except MedsegError as error:
        raise DatasetError(
            f"{case.name} could not be prepared: {error}", path=error.path or case.images[0], reason=error.reason
        ) from error
    except Exception as error:  # whatever it is, it must be known which case it was
        raise DatasetError(
            f"{case.name} could not be prepared: {type(error).__name__}. Look at this case, or take it out.",
            path=case.images[0],
            reason="case",
        ) from error
    known = [label.value not in case.undrawn for label in plan.regions or plan.labels]
    return Prepared(
        case.name,
        image,
        target,
        places,
        np.array(known if plan.regions else [True, *known]),
        lost,
    )


Opened = tuple[Chunks, Chunks, dict[int, Places], NDArray[np.int64]]


def _opened(files: dict[str, Path]) -> Opened | None:
    """Return the arrays in files; None where one is not there, was cut short or is something else."""
    try:
        image, target = (Chunks.of(files[part]) for part in ("image", "target"))
        places, lost = _places_in(files["places"]), np.load(files["lost"])
    except (OSError, ValueError, EOFError, RuntimeError, AttributeError):
        return None  # the last two for what is no file of blosc2's, or one of its but no array
    return (image, target, places, lost) if image.shape[1:] == target.shape else None


def _written(files: dict[str, Path], arrays: dict[str, NDArray[Any]]) -> Opened:
    for part in ("image", "target"):
        array = np.ascontiguousarray(arrays[part])
        chunks = equal_parts(array.shape, CHUNKS)
        blocks = equal_parts(chunks, BLOCKS)
        packed = blosc2.asarray(array, chunks=chunks, blocks=blocks, cparams=PACKING)
        with written_whole(files[part]) as beside:
            beside.write_bytes(packed.to_cframe())
    for part in ("lost", "places"):
        with written_whole(files[part]) as beside, beside.open("wb") as stream:
            np.save(stream, arrays[part], allow_pickle=False)
    image, target = (Chunks.of(files[part]) for part in ("image", "target"))
    return image, target, _places_in(files["places"]), arrays["lost"]


def _places_in(file: Path) -> dict[int, Places]:
    """Return where the rows of each class are in a file of `_places`."""
    numbers, first, counts = np.unique(np.load(file, mmap_mode="r")[:, 0], return_index=True, return_counts=True)
    return {
        number: Places(file, *part)
        for number, *part in zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True)
    }


def equal_parts(shape: tuple[int, ...], longest: int) -> tuple[int, ...]:
    """Return edges of equal parts of an array, its channels apart: what is left over would be filled up and packed."""
    return *(1 for _ in shape[:-3]), *(math.ceil(edge / math.ceil(edge / longest)) for edge in shape[-3:])


def _arrays(case: Case, plan: Plan) -> dict[str, NDArray[Any]]:
    image, labels = read_case(case)
    box = box_to_see(image, plan)
    image, seen = image.cropped(*box), labels.cropped(*box)
    if np.count_nonzero(seen.array) == np.count_nonzero(labels.array):
        labels = seen  # nothing is cut off, and voxels that stay as they are need no second look
    prepared = prepare(image, plan)
    target = _drawn_numbers(label_map(resample_labels(seen, prepared.grid)), case, plan)
    lost = list(lost_parts(_drawn_numbers(label_map(labels), case, plan), labels.grid, target, prepared.grid))
    if plan.keep_small:
        lost = keep_parts(target, lost)
    return {
        "image": prepared.array,
        "target": target,
        "places": _places(target, ignored=case.ignore is not None),
        "lost": np.asarray([one.row for one in lost], np.int64).reshape(-1, 5),
    }


def _drawn_numbers(values: NDArray[np.integer], case: Case, plan: Plan) -> NDArray[np.integer]:
    """Return the class numbers of a case's label values; what was not drawn there is not known, and 0."""
    numbers = _class_numbers(values, values_of(plan.labels, plan.regions), case.ignore)
    members = members_of(plan.labels, plan.regions)
    drawn = {one for value in members if value not in case.undrawn for one in members[value]}
    for number, value in enumerate(values_of(plan.labels, plan.regions), start=1):
        if value not in drawn:
            numbers[numbers == number] = 0
    return numbers


def _class_numbers(
    values: NDArray[np.integer], classes: Sequence[int], ignore: int | None
) -> NDArray[np.int8] | NDArray[np.int16]:
    """Return the place of each value among the classes, from 1; 0 for others, IGNORED for what is to be ignored."""
    target = np.zeros(values.shape, np.int8 if len(classes) <= np.iinfo(np.int8).max else np.int16)
    marked = np.flatnonzero(values)
    found = values.ravel()[marked]
    numbers = np.minimum(np.searchsorted(classes, found), len(classes) - 1)
    numbers = np.where(np.asarray(classes)[numbers] == found, numbers + 1, 0)
    target.ravel()[marked] = numbers if ignore is None else np.where(found == ignore, IGNORED, numbers)
    return target


def _places(target: NDArray[np.integer], *, ignored: bool) -> NDArray[np.int32]:
    """Return rows (class, i, j, k) of voxels, ascending by class; with `ignored` class 0 is any that counts."""
    marked = np.flatnonzero(target >= 0 if ignored else target > 0)
    numbers = target.ravel()[marked]
    chosen = {0: marked} if ignored else {}
    chosen |= {number: marked[numbers == number] for number in np.unique(numbers[numbers > 0]).tolist()}
    rows = [np.empty((0, 4), np.int32)]
    for number, voxels in chosen.items():
        keep = voxels[np.linspace(0, len(voxels) - 1, min(len(voxels), PLACES_PER_CLASS)).astype(int)]
        where = np.stack(np.unravel_index(keep, target.shape), axis=1).astype(np.int32)
        rows.append(np.insert(where, 0, number, axis=1))
    return np.concatenate(rows)


def needed_stems(cases: Sequence[Case], plan: Plan, folder: Path) -> list[str]:
    """Return what the files of each case under a plan are called in a cache folder, without their endings.

    Raises OSError where a source file cannot be read.
    """
    hashes = FileHashes(folder / "files.json")
    stems = [stem for _, stem in side_by_side(partial(_stem, plan=plan, hashes=hashes), cases)]
    with suppress(OutputError):  # a full disk is what sweeping may mend
        hashes.save()
    return stems


def _files(case: Case, plan: Plan, folder: Path, hashes: FileHashes) -> dict[str, Path]:
    stem = _stem(case, plan, hashes)
    return {part: folder / f"{stem}.{ending}" for part, ending in FILES.items()}


def _stem(case: Case, plan: Plan, hashes: FileHashes) -> str:
    steps = plan.model_dump(mode="json", include=PREPARING)
    content = [hashes.of(file) for _, file in case.files]
    facts = json.dumps([FORMAT, steps, content, sorted(case.undrawn), case.ignore], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]
