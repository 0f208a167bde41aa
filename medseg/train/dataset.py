"""A folder of images and labels, in medseg's layout, nnU-Net's raw layout or the Medical Segmentation Decathlon's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from medseg.errors import DatasetError
from medseg.io.text import read_json
from medseg.labels import Label
from medseg.train.case_files import find_cases, missing, surplus
from medseg.train.dataset_json import Meaning, read_description
from medseg.train.splits import Split, check_groups, read_splits

FOLDS = 5

FOLD_SEED = 12345
"""The seed of nnU-Net's folds, so that results on a public dataset can be compared case by case."""

Fold = int | Literal["none"]
"""Which part of the cases is kept aside, from 0; with "none" no case is, and all of them train."""


@dataclass(frozen=True)
class Case:
    """One labelled image: a name, one file per channel or one with all `channels`, and the file of its labels.

    `undrawn` are the values of structures that nobody drew here: they may be there, but the labels do not say where.
    Of voxels with the value `ignore` nothing is known. Cases of one `group` (a patient) stay together: no fold trains
    on one of them and is validated on another.
    """

    name: str
    images: tuple[Path, ...]
    label: Path
    undrawn: frozenset[int] = frozenset()
    group: str = ""
    ignore: int | None = None
    channels: int = 1

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """Its files, each with what it is: "image" or "channel N", and "label"."""
        alone = len(self.images) == 1
        images = (("image" if alone else f"channel {place}", file) for place, file in enumerate(self.images))
        return (*images, ("label", self.label))


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one kind, sorted by name, with what their channels and labels are called.

    `splits` are the folds that came with them; without any, folds are drawn.
    """

    name: str
    channels: tuple[str, ...]
    meaning: Meaning
    cases: tuple[Case, ...]
    splits: tuple[Split, ...] = ()

    @property
    def labels(self) -> tuple[Label, ...]:
        """The label table of what a model of this dataset segments."""
        return self.meaning.labels

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases)

    @property
    def folds(self) -> int:
        """How many folds there are unless it is said otherwise: those that came with the dataset, or 5."""
        return len(self.splits) or FOLDS

    def fold(self, fold: Fold, folds: int | None = None) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
        """Return the (training, validation) cases of a fold that came with the dataset, or of one of `folds` drawn.

        They are drawn as nnU-Net's: shuffled, on sorted groups, seed 12345. A case without a group is a group of its
        own. With "none" all cases train, those in no fold of a list too, and there are no validation cases.
        Raises DatasetError where there are fewer groups than folds, other folds came with it, or no fold of that
        number.
        """
        if fold == "none":
            return self.cases, ()
        folds = folds or self.folds
        if self.splits:
            return self._listed(fold, folds)
        groups = sorted({case.group or case.name for case in self.cases})
        if not 0 <= fold < folds <= len(groups) or folds < 2:
            raise DatasetError(
                f"Fold {fold} of {folds} cannot be made from {len(groups)} cases or groups of them: folds count from "
                "0, and each needs one to validate on. At least two cases (or groups) are needed, and two folds: give "
                "more cases, or fewer folds; or keep no case aside (--fold none), and have no scores.",
                reason="folds",
            )
        order = np.arange(len(groups))
        np.random.RandomState(FOLD_SEED).shuffle(order)
        chosen = {groups[place] for place in np.array_split(order, folds)[fold]}
        training = tuple(case for case in self.cases if (case.group or case.name) not in chosen)
        return training, tuple(case for case in self.cases if (case.group or case.name) in chosen)

    def _listed(self, fold: int, folds: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
        if folds != len(self.splits) or not 0 <= fold < folds:
            raise DatasetError(
                f"Fold {fold} of {folds} is not one of the {len(self.splits)} that came with the dataset "
                "(splits_final.json, or dataset.json): folds count from 0. Give their number, or remove that list to "
                "have folds drawn.",
                reason="folds",
            )
        training, validation = (tuple(case for case in self.cases if case.name in side) for side in self.splits[fold])
        return training, validation


def read_dataset(folder: str | PathLike[str], *, check_files: bool = True) -> Dataset:
    """Return the labelled cases of a dataset folder, sorted by name.

    A file cases.json, if there, lists what is special about cases: [{"case": NAME, "structures": ["liver"], "group":
    "patient 7"}], where `structures` names those that were drawn and each field but the first may be left out.
    Raises DatasetError for a field that is missing or makes no sense and, unless `check_files` is off, one that lists
    every missing file.
    """
    root = Path(folder)
    told = read_description(root)
    channels, ignore = len(told.channels), told.meaning.ignore
    found = find_cases(root, told.fields, channels)
    refuse([f"{one.name}: {problem}" for one in found if (problem := surplus(one, channels))], root)
    cases = [Case(one.name, one.images, one.label, ignore=ignore, channels=channels) for one in found]
    twins = sorted(name for name, count in Counter(case.name for case in cases).items() if count > 1)
    refuse([f"{name}: two label files are called so; rename or remove one" for name in twins], root)
    if check_files:
        refuse([f"{case.name}: {problem}" for case in cases for problem in missing_files(case)], root)
    splits = read_splits(root, told.fields, {case.name: case.label for case in cases})
    cases = _with_facts(sorted(cases, key=lambda case: case.name), root / "cases.json", told.meaning.labels)
    check_groups(splits, {case.name: case.group for case in cases})
    return Dataset(told.name, told.channels, told.meaning, tuple(cases), splits)


def refuse(problems: Sequence[str], path: Path | None = None) -> None:
    """Raise DatasetError that lists the problems, a line for each, if there are any."""
    if problems:
        text = f"The dataset has {len(problems)} problem(s):\n" + "\n".join(problems)
        raise DatasetError(text, path=path, reason="cases")


def missing_files(case: Case) -> list[str]:
    """Return a line for each file of a case that is not there."""
    return [f"{part} is missing: {where}" for part, file in case.files if (where := missing(file))]


def read_facts(path: Path, labels: Sequence[Label]) -> dict[str, tuple[frozenset[int], str]]:
    """Return what a cases.json says of each case that it names: the values that were not drawn, and the group.

    Raises DatasetError for what makes no sense in it, or names a structure that is not in the label table.
    """
    if not path.is_file():
        return {}
    values = {label.name: label.value for label in labels}
    rows = read_json(path, "The file cases.json of the dataset", DatasetError)
    try:
        facts = {str(row["case"]): row for row in rows}
        drawn = {name: {str(one) for one in row.get("structures", values)} for name, row in facts.items()}
        groups = {name: "" if row.get("group") is None else str(row["group"]) for name, row in facts.items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            'The file cases.json must be a list of objects such as {"case": "a", "structures": ["liver"]}.', path=path
        ) from error
    twice = sorted(name for name, count in Counter(str(row["case"]) for row in rows).items() if count > 1)
    if twice:  # of two rows one would be forgotten
        raise DatasetError(
            f"The file cases.json names {', '.join(twice[:10])} twice: one row for each case.", path=path
        )
    _refuse_unknown({one for ones in drawn.values() for one in ones} - set(values), path)
    return {
        name: (frozenset(value for one, value in values.items() if one not in drawn[name]), groups[name])
        for name in facts
    }


def _with_facts(cases: list[Case], path: Path, labels: Sequence[Label]) -> list[Case]:
    """Return the cases with what cases.json says of them."""
    facts = read_facts(path, labels)
    _refuse_unknown(set(facts) - {case.name for case in cases}, path)
    told = ((case, *facts.get(case.name, (frozenset(), ""))) for case in cases)
    return [replace(case, undrawn=undrawn, group=group) for case, undrawn, group in told]


def _refuse_unknown(names: set[str], path: Path) -> None:
    if names:
        raise DatasetError(
            "The file cases.json names cases or structures that the dataset does not have: "
            f"{', '.join(sorted(names)[:10])}.",
            path=path,
        )
