"""A folder of images and labels, in medseg's layout, nnU-Net's raw layout or the Medical Segmentation Decathlon's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DatasetError
from medseg.io import VOLUME_ENDINGS
from medseg.labels import Label, make_labels

FOLD_SEED = 12345
"""The seed of nnU-Net's folds, so that results on a public dataset can be compared case by case."""


@dataclass(frozen=True)
class Case:
    """One labelled image: a name, one file per channel, and the file of its labels.

    `undrawn` are the values of structures that nobody drew here: they may be there, but the labels do not say where.
    Cases of one `group` (a patient) stay together: no fold trains on one of them and is validated on another.
    """

    name: str
    images: tuple[Path, ...]
    label: Path
    undrawn: frozenset[int] = frozenset()
    group: str = ""


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one kind, sorted by name, with what their channels and labels are called."""

    name: str
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    cases: tuple[Case, ...]

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases)

    def fold(self, fold: int, folds: int = 5) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
        """Return the (training, validation) cases of one of `folds` folds: shuffled, on sorted groups, seed 12345.

        A case without a group is a group of its own.
        Raises DatasetError where there are fewer groups than folds or no fold of that number.
        """
        groups = sorted({case.group or case.name for case in self.cases})
        if not 0 <= fold < folds <= len(groups):
            raise DatasetError(
                f"Fold {fold} of {folds} cannot be made from {len(groups)} cases or groups of them: folds count from "
                "0, and each needs one to validate on."
            )
        order = np.arange(len(groups))
        np.random.RandomState(FOLD_SEED).shuffle(order)
        chosen = {groups[place] for place in np.array_split(order, folds)[fold]}
        training = tuple(case for case in self.cases if (case.group or case.name) not in chosen)
        return training, tuple(case for case in self.cases if (case.group or case.name) in chosen)


def read_dataset(folder: str | PathLike[str]) -> Dataset:
    """Return the labelled cases of a dataset folder, sorted by name.

    A file cases.json, if there, lists what is special about cases: [{"case": NAME, "structures": ["liver"], "group":
    "patient 7"}], where `structures` names those that were drawn and each field but the first may be left out.
    Raises DatasetError that lists every missing file or field, up to ten of them.
    """
    root = Path(folder)
    content = _read_json(root / "dataset.json")
    channels = _names(content.get("channel_names", content.get("modality")), root)
    labels = _labels(content.get("labels"), root)
    cases = _decathlon_cases(root, content) if "training" in content else _folder_cases(root, content, len(channels))
    problems = [
        f"{case.name}: {part} is missing"
        for case in cases
        for part, file in [
            *((f"channel {place}", image) for place, image in enumerate(case.images)),
            ("label", case.label),
        ]
        if not file.is_file()
    ]
    if not cases:
        problems.append("there is no labelled image")
    if problems:
        raise DatasetError(f"The dataset has {len(problems)} problem(s): {'; '.join(problems[:10])}.", path=root)
    cases = _with_facts(sorted(cases, key=lambda case: case.name), root / "cases.json", labels)
    return Dataset(str(content.get("name", root.resolve().name)), channels, labels, tuple(cases))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError("A dataset folder needs a readable file dataset.json.", path=path) from error
    except ValueError as error:
        raise DatasetError("The file dataset.json is not valid JSON.", path=path) from error
    if not isinstance(content, dict):
        raise DatasetError("The file dataset.json must hold one object with channel_names and labels.", path=path)
    return content


def _with_facts(cases: list[Case], path: Path, labels: Sequence[Label]) -> list[Case]:
    """Return the cases with what cases.json says of them."""
    if not path.is_file():
        return cases
    values = {label.name: label.value for label in labels}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        facts = {str(row["case"]): row for row in rows}
        drawn = {name: [str(one) for one in row.get("structures", values)] for name, row in facts.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            'The file cases.json must be a list of objects such as {"case": "a", "structures": ["liver"]}.', path=path
        ) from error
    names = {case.name for case in cases}
    unknown = sorted((set(facts) - names) | {one for ones in drawn.values() for one in ones if one not in values})
    if unknown:
        raise DatasetError(
            f"The file cases.json names cases or structures that the dataset does not have: {', '.join(unknown[:10])}.",
            path=path,
        )
    return [
        replace(
            case,
            undrawn=frozenset(set(values.values()) - {values[one] for one in drawn.get(case.name, values)}),
            group=str(facts.get(case.name, {}).get("group", "")),
        )
        for case in cases
    ]


def _names(channels: object, root: Path) -> tuple[str, ...]:
    if not isinstance(channels, Mapping) or sorted(channels) != sorted(str(place) for place in range(len(channels))):
        raise DatasetError(
            'The field "channel_names" (or "modality") must name every channel, as in {"0": "CT"}.',
            path=root / "dataset.json",
        )
    return tuple(str(channels[str(place)]) for place in range(len(channels)))


def _labels(labels: object, root: Path) -> tuple[Label, ...]:
    # The decathlon writes {"1": "liver"}, nnU-Net {"liver": 1}.
    pairs = []
    for key, value in labels.items() if isinstance(labels, Mapping) else ():
        name, number = (value, key) if str(key).isdigit() else (key, value)
        if not str(number).isdigit() or str(name) == "ignore":
            raise DatasetError(
                f"The label {name!r} is not one whole number: regions and ignore labels cannot be trained yet.",
                path=root / "dataset.json",
                reason="labels",
            )
        pairs.append((int(number), str(name)))
    if not any(number for number, _ in pairs) or len({number for number, _ in pairs}) < len(pairs):
        raise DatasetError(
            'The field "labels" must give each structure a value of its own above 0, as in {"liver": 1}.',
            path=root / "dataset.json",
            reason="labels",
        )
    return make_labels(pairs)


def _decathlon_cases(root: Path, content: Mapping[str, Any]) -> list[Case]:
    pairs: Sequence[Mapping[str, str]] = content["training"]
    return [
        Case(_stem(Path(pair["image"]).name), (root / pair["image"],), root / pair["label"])
        for pair in pairs
        if "image" in pair and "label" in pair
    ]


def _folder_cases(root: Path, content: Mapping[str, Any], channels: int) -> list[Case]:
    images, labels = (
        (root / "imagesTr", root / "labelsTr") if (root / "imagesTr").is_dir() else (root / "images", root / "labels")
    )
    endings = (str(content["file_ending"]),) if "file_ending" in content else VOLUME_ENDINGS
    cases = []
    for label in sorted(labels.glob("*")) if labels.is_dir() else ():
        name = _stem(label.name)
        ending = label.name[len(name) :]
        if ending not in endings:
            continue
        plain = images / f"{name}{ending}"
        numbered = tuple(images / f"{name}_{place:04d}{ending}" for place in range(channels))
        cases.append(Case(name, (plain,) if channels == 1 and plain.is_file() else numbered, label))
    return cases


def _stem(file_name: str) -> str:
    for ending in sorted(VOLUME_ENDINGS, key=len, reverse=True):
        if file_name.endswith(ending):
            return file_name[: -len(ending)]
    return Path(file_name).stem
