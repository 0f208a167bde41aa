"""Folds that come with a dataset: which cases are trained on, and which are kept aside, as somebody decided before."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medseg.errors import DatasetError
from medseg.io.text import read_json

Split = tuple[frozenset[str], frozenset[str]]
"""The names of the cases that a fold trains on, and of those that it is validated on."""

FILE = "splits_final.json"

MAY_BE_A_LIST = re.compile(
    r"(.*split.*|(cross_?val|folds?|groups?|patients?|participants|subjects?|train|training|val|validation)([_-].*)?)"
    r"\.(json|pkl|csv|tsv|txt|xlsx|ya?ml)",
    re.IGNORECASE,
)
"""What lists of folds or of patients are called. Only those in nnU-Net's JSON are read, and cases.json."""


def read_splits(root: Path, fields: Mapping[str, Any], labels: Mapping[str, Path]) -> tuple[Split, ...]:
    """Return the folds that a dataset folder lists: in nnU-Net's splits_final.json, or as "fold" of training cases.

    `labels` are the label files of the cases by name. Without a list there are no folds. Raises DatasetError for a list
    that makes no sense, and warns of lists that are not read.
    """
    file = root / FILE
    splits = _of_file(file) if file.is_file() else _of_fields(root, fields, labels)
    unknown = sorted({name for split in splits for side in split for name in side} - set(labels))
    if unknown:
        raise _wrong(
            f"It names {len(unknown)} case(s) that the dataset does not have: {', '.join(unknown[:10])}.", file
        )
    if any(not train or not val or train & val for train, val in splits):
        raise _wrong("Each fold needs cases to train on, others to validate on, and no case on both sides.", file)
    _warn(root, fields, [name for name in labels if splits and not any(name in side for one in splits for side in one)])
    return splits


def check_groups(splits: Iterable[Split], groups: Mapping[str, str]) -> None:
    """Raise DatasetError where a fold has cases of one group on both sides; `groups` are those of the cases by name."""
    for train, val in splits:
        seen = {groups[name]: name for name in sorted(train) if groups[name]}
        torn = [f"{seen[groups[name]]} and {name}" for name in sorted(val) if groups[name] in seen]
        if torn:
            raise DatasetError(
                "The folds that come with the dataset train on a case and validate on another one of the same group of "
                f"cases.json: {', '.join(torn[:5])}. Correct one of the two files.",
                reason="folds",
            )


def _of_file(file: Path) -> tuple[Split, ...]:
    content = read_json(file, "The list of folds", DatasetError)
    try:
        listed = content if isinstance(content, list) else [content]
        sides = [(one["train"], one["val"]) for one in listed]
    except (TypeError, KeyError) as error:
        raise _wrong('It must be a list of folds such as {"train": ["a", "b"], "val": ["c"]}.', file) from error
    names = [name for pair in sides for side in pair for name in (side if isinstance(side, list) else [None])]
    if not sides or not all(isinstance(name, str) for name in names):
        raise _wrong('It must be a list of folds such as {"train": ["a", "b"], "val": ["c"]}.', file)
    return tuple((frozenset(train), frozenset(val)) for train, val in sides)


def _of_fields(root: Path, fields: Mapping[str, Any], labels: Mapping[str, Path]) -> tuple[Split, ...]:
    """Return the folds that the field "fold" of the cases in "training" makes; none unless every case has one."""
    listed = fields.get("training")
    rows = listed if isinstance(listed, list) else []
    pairs = [pair for pair in rows if isinstance(pair, Mapping) and "label" in pair]
    told = {root / str(pair["label"]): pair["fold"] for pair in pairs if isinstance(pair.get("fold"), int)}
    fold_of = {name: told[file] for name, file in labels.items() if file in told}
    if not fold_of:
        return ()
    if len(fold_of) < len(labels) or len(set(fold_of.values())) < 2:
        warnings.warn(
            'dataset.json gives a "fold" to some cases, or one fold to all of them, and is not followed: give each '
            "case of the list one of at least two.",
            stacklevel=4,
        )
        return ()
    return tuple(
        (
            frozenset(name for name, number in fold_of.items() if number != fold),
            frozenset(name for name, number in fold_of.items() if number == fold),
        )
        for fold in sorted(set(fold_of.values()))
    )


def _warn(root: Path, fields: Mapping[str, Any], left_out: list[str]) -> None:
    """Warn of lists that are not read, since patients may be on both sides of a fold without them."""
    told = []
    if left_out:
        told.append(
            f"{len(left_out)} case(s) are in no fold of the list, so that no fold uses them: {', '.join(left_out[:10])}"
        )
    if fields.get("validation"):
        told.append('the cases of "validation" in dataset.json are not read; list them in "training"')
    elsewhere = root.parent.parent / "nnUNet_preprocessed" / root.name / FILE
    if elsewhere.is_file() and not (root / FILE).is_file():
        told.append(f"the {FILE} of nnUNet_preprocessed is not read; copy it beside dataset.json to follow it")
    others = sorted(file.name for file in root.iterdir() if MAY_BE_A_LIST.fullmatch(file.name) and file.name != FILE)
    if others:
        told.append(
            f"{', '.join(others[:5])} may list folds or patients and is not read; {FILE} and cases.json would be"
        )
    if told:
        warnings.warn(f"Folds of the dataset: {'; '.join(told)}.", stacklevel=4)


def _wrong(why: str, file: Path) -> DatasetError:
    source = f"The file {FILE}" if file.is_file() else 'The field "fold" of dataset.json'
    return DatasetError(f"{source} cannot be followed. {why}", path=file, reason="folds")
