"""Where the images and labels of a dataset's cases are: in its folders, or as dataset.json lists them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.errors import DatasetError
from medseg.io import VOLUME_ENDINGS
from medseg.io.scans import NUMBERED, split_ending

FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
"""What the folders of images and labels are called: by nnU-Net and the decathlon, and by medseg."""


@dataclass(frozen=True)
class CaseFiles:
    """The name of a case, its images, one for each channel or one with all, and its labels; files may be missing."""

    name: str
    images: tuple[Path, ...]
    label: Path


def find_cases(root: Path, fields: Mapping[str, Any], channels: int) -> list[CaseFiles]:
    """Return the cases that dataset.json lists ("dataset" or "training"), or else those of the folder of labels.

    Raises DatasetError for a list that makes no sense. Where there is no case it says what was looked for, and what is
    there instead. Warns of label files that a list leaves out.
    """
    if "dataset" in fields:
        cases = _listed_by_name(root, fields["dataset"], channels)
    elif fields.get("training", []) != []:
        cases = _listed(root, fields["training"], channels)
    else:
        return _in_folders(root, fields, channels)
    if not cases:
        raise _no_case('the lists of dataset.json ("dataset", "training") name no image with a label', root)
    _warn_of_unlisted(cases)
    return cases


def missing(file: Path) -> str | None:
    """Return where a file was looked for, and what is there in its place; None where it is there."""
    if file.is_file():
        return None
    if not file.parent.is_dir():
        return f"there is no folder {file.parent.name}"
    name, ending = split_ending(file.name)
    numbered = NUMBERED.fullmatch(name)
    stem = numbered[1] if numbered else name
    sought = f"{stem}{ending} or {file.name}" if numbered and numbered[2] == "0000" else file.name
    near = [one.name for one in sorted(file.parent.iterdir()) if re.match(rf"{re.escape(stem)}(?![^\W_])", one.name)]
    there = f"it holds {', '.join(near[:3])}" if near else _held(file.parent)
    return f"looked for {sought} in {file.parent.name}; {there}"


def surplus(case: CaseFiles, channels: int) -> str | None:
    """Return what is wrong where images NAME_0000 ... go on beyond the channels; None where they do not."""
    name, ending = split_ending(case.images[0].name)
    if name != f"{case.name}_0000" or not case.images[0].is_file():
        return None
    beyond = _with_any_ending(case.images[0].parent, f"{case.name}_{channels:04d}", ending)
    return (
        f"there is an image {channels:04d}, too; dataset.json names {channels} channel(s)" if beyond.is_file() else None
    )


def _in_folders(root: Path, fields: Mapping[str, Any], channels: int) -> list[CaseFiles]:
    images, labels = next(((root / one, root / other) for one, other in FOLDERS if (root / one).is_dir()), (None, None))
    if (root / "gt_segmentations").is_dir():
        raise _no_case("this is what nnU-Net prepared (nnUNet_preprocessed); give the folder in nnUNet_raw", root)
    if images is None or labels is None:
        raise _no_case(f"there is no folder imagesTr or images beside dataset.json; {_held(root)}", root)
    if not labels.is_dir():
        raise _no_case(f"{images.name} is there, and the folder {labels.name} is not", root)
    endings = _endings(fields)
    named = [(file, *split_ending(file.name)) for file in sorted(labels.iterdir()) if not file.name.startswith(".")]
    cases = [
        CaseFiles(name, _images(images, name, ending, channels), file)
        for file, name, ending in named
        if ending.lower() in endings
    ]
    if not cases:
        stated = ", as file_ending in dataset.json says" if "file_ending" in fields else ""
        sought = f"looked for {', '.join(endings)} in {labels.name}{stated}"
        raise _no_case(f"{sought}; {_held(labels)}", root)
    if all(image.is_file() for case in cases for image in case.images):
        _warn_of_left_out(images, cases, fields.get("numTraining"))
    return cases


def _endings(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if "file_ending" not in fields:
        return VOLUME_ENDINGS
    return (f".{str(fields['file_ending']).lower().lstrip('.')}",)


def _images(folder: Path, name: str, ending: str, channels: int) -> tuple[Path, ...]:
    """Return the images of a case: NAME_0000, NAME_0001 ... or NAME, with the ending of its labels or another one.

    One channel may be called either way; several channels in one file NAME are along its fourth axis.
    """
    plain = _with_any_ending(folder, name, ending)
    numbered = tuple(_with_any_ending(folder, f"{name}_{place:04d}", ending) for place in range(channels))
    return (plain,) if plain.is_file() and (channels == 1 or not numbered[0].is_file()) else numbered


def _with_any_ending(folder: Path, name: str, ending: str) -> Path:
    """Return the file of a name with this ending, or the first that is there with the ending of another volume."""
    wanted = folder / f"{name}{ending}"
    others = (folder / f"{name}{one}" for one in VOLUME_ENDINGS)
    return wanted if wanted.is_file() else next((one for one in others if one.is_file()), wanted)


def _listed(root: Path, given: object, channels: int) -> list[CaseFiles]:
    """Return the cases of "training", of pairs of an image (or one for each channel) and a label file."""
    right = isinstance(given, list) and all(isinstance(pair, dict) for pair in given)
    pairs = [pair for pair in given if "image" in pair and "label" in pair] if isinstance(given, list) and right else []
    files = [(None, _paths(root, pair["image"]), _paths(root, pair["label"])) for pair in pairs]
    if not right or not _fit(files, channels):
        raise DatasetError(
            'The field "training" of dataset.json must list pairs of an image and a label file, such as {"image": '
            '"imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}; "image" may list one file for each channel.',
            path=root / "dataset.json",
        )
    return [_listed_case(*one, channels) for one in files]


def _listed_by_name(root: Path, given: object, channels: int) -> list[CaseFiles]:
    """Return the cases of "dataset", nnU-Net's {NAME: {"images": [one for each channel], "label": file}}."""
    rows = given if isinstance(given, dict) else {}
    right = bool(rows) and all(isinstance(row, dict) and {"images", "label"} <= row.keys() for row in rows.values())
    named = rows.items() if right else ()
    files = [(name, _paths(root, row["images"]), _paths(root, row["label"])) for name, row in named]
    if not right or not _fit(files, channels):
        raise DatasetError(
            'The field "dataset" of dataset.json must name the files of each case, one image for each channel, such as '
            '{"a": {"images": ["scans/a_0000.nii.gz"], "label": "marks/a.nii.gz"}}.',
            path=root / "dataset.json",
        )
    return [_listed_case(*one, channels) for one in files]


def _fit(files: Sequence[tuple[str | None, tuple[Path, ...], tuple[Path, ...]]], channels: int) -> bool:
    return all(len(images) in {1, channels} and len(labels) == 1 for _, images, labels in files)


def _listed_case(name: str | None, images: tuple[Path, ...], labels: tuple[Path, ...], channels: int) -> CaseFiles:
    first, label = images[0], labels[0]
    if len(images) > 1:
        return CaseFiles(name or split_ending(label.name)[0], images, label)
    stem, ending = split_ending(first.name)
    if stem == f"{split_ending(label.name)[0]}_0000":  # one channel stands for all
        stem = stem.removesuffix("_0000")
    elif first.is_file():
        return CaseFiles(name or stem, images, label)
    # nnU-Net's first version lists NAME, and the files are called NAME_0000, NAME_0001 ...
    return CaseFiles(name or stem, _images(first.parent, stem, ending, channels), label)


def _paths(root: Path, given: object) -> tuple[Path, ...]:
    """Return the paths that a list has, or the one that a text is; none for anything else."""
    listed = given if isinstance(given, list) else [given]
    texts = [one.replace("\\", "/") for one in listed if isinstance(one, str) and one]  # lists of Windows
    return tuple(root / one for one in texts) if len(texts) == len(listed) else ()


def _warn_of_unlisted(cases: Sequence[CaseFiles]) -> None:
    """Warn of volumes in folders of labels alone that no case has."""
    folders = {case.label.parent for case in cases} - {image.parent for case in cases for image in case.images}
    listed = {case.label.resolve() for case in cases}
    others = (file for folder in folders if folder.is_dir() for file in folder.iterdir())
    left_out = [file for file in others if _is_volume(file) and file.resolve() not in listed]
    if left_out:
        warnings.warn(
            f"{len(left_out)} label file(s) are not in the list of dataset.json and are left out. Remove the list to "
            "train on all files of the folders.",
            stacklevel=4,  # the caller of read_dataset
        )


def _warn_of_left_out(folder: Path, cases: Sequence[CaseFiles], stated: object) -> None:
    """Warn of images whose names no case has, and of another number of cases than dataset.json states."""
    known = {case.name for case in cases}
    names = {split_ending(file.name)[0] for file in folder.iterdir() if _is_volume(file)} - known
    stems = {numbered[1] if (numbered := NUMBERED.fullmatch(name)) else name for name in names} - known
    told = [f"{len(stems)} image(s) in {folder.name} have no label file and are left out"] if stems else []
    if isinstance(stated, int) and stated != len(cases):
        told.append(f"numTraining in dataset.json is {stated}, and there are {len(cases)} label files")
    if told:
        warnings.warn(f"Cases of the dataset: {'; '.join(told)}.", stacklevel=5)  # the caller of read_dataset


def _is_volume(file: Path) -> bool:
    return not file.name.startswith(".") and file.name.lower().endswith(VOLUME_ENDINGS)


def _no_case(why: str, root: Path) -> DatasetError:
    return DatasetError(f"The dataset has 1 problem(s): there is no labelled image: {why}.", path=root)


def _held(folder: Path) -> str:
    """Return how many files of which endings a folder holds; their names, which may be those of patients, stay out."""
    shown = [one for one in folder.iterdir() if not one.name.startswith(".")]
    kinds = Counter("folder" if one.is_dir() else f"{split_ending(one.name)[1] or one.suffix} file" for one in shown)
    return f"it holds {', '.join(f'{count} {kind}(s)' for kind, count in kinds.most_common(4)) or 'nothing'}"
