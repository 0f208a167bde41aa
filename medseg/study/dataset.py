"""A training folder made of studies and the contours that a hospital drew in them: images, labels, who drew what.

OUT/images, labels, dataset.json, cases.json     to be shared: named by keyed hashes, nothing about the patient
OUT.private/key, studies.csv                     what leads from the hashes back; for its owner alone (0600)
OUT.private/cases/CASE.json                      what became of each study: started again, what is done is kept
OUT.private/summary.csv, structures.csv          the same as tables, and the structures that no rule took

"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import InputError, UnreadableFile, UsageError
from medseg.io.dicom_file import begins_as_dicom, read_data
from medseg.io.dicom_header import parsing
from medseg.io.dicom_series import Series
from medseg.io.regions import volume_of
from medseg.io.structures import CONTENT, StructureFile, describe_structures
from medseg.labels import make_labels
from medseg.study.archive import check_one, opened
from medseg.study.choose import choose
from medseg.study.cohort import Entry, find_cohort, with_objects
from medseg.study.dataset_folder import CaseOutcome, DatasetFolder
from medseg.study.find import Study, read_studies
from medseg.study.listing import listed
from medseg.study.rules import DatasetRules, LabelRule, load_rules
from medseg.study.run import ending, only_study, read_channels
from medseg.volume import Array, Grid, Volume

TOLD = {
    "open": "contours are open or points, and are left out",
    "outside": "contours lie outside the series, and are left out",
    "between": "contours lie between slices, and are taken to the nearest",
    "cut": "contours reach beyond the edges of the slices, and are cut there",
    "miscounted": "contours have another number of points than they state",
    "unlisted": "contours have a number that no structure has, and are left out",
    "repeated": "structures have the number of another, and count as not drawn",
    "undescribed": "frames show segments that nobody describes, and are left out",
    "background": "segments have the number of the background, and are left out",
    "frame": "structures state another frame of reference, and refer to the very slices of the series",
}
"""What a case is told with, though some of its structures are odd."""


@dataclass
class _Made:
    """What a study gives: its channels and labels, the labels that were drawn, and what has to be said of them."""

    untaken: tuple[str, ...] = ()
    image: Volume | None = None
    labels: Volume | None = None
    structures: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    registrations: list[dict[str, Any]] = field(default_factory=list)


def make_dataset(
    studies: str | PathLike[str],
    out: str | PathLike[str],
    rules: str | PathLike[str] | DatasetRules,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[CaseOutcome]:
    """Return what became of every study of a folder; those that are taken are cases of the training folder `out`.

    A study is taken where RT Structure Sets or DICOM SEG, of its own or of another study of the folder, refer to the
    series of the first channel and hold structures that the rules take. Started again, it keeps what is done with the
    same rules and unchanged files; more studies can be added from other folders. Names are hashes with a key that lies,
    as all that leads back, in `out`.private beside it.
    Raises UsageError for rules that make no sense, UnreadableFile without DICOM files, OutputError where `out` cannot
    be written; no single study raises.
    """
    chosen = rules if isinstance(rules, DatasetRules) else load_rules(rules)
    if Path(out).resolve().is_relative_to(Path(studies).resolve()):
        raise UsageError("The dataset would lie among the studies: give a folder outside of theirs.", path=out)
    entries = with_objects(find_cohort(studies))
    if not entries:
        raise UnreadableFile("There is no DICOM file here.", path=studies, reason="no_dicom")
    folder = DatasetFolder.open(out, chosen)
    folder.remember(entries)
    outcomes = []
    for number, entry in enumerate(entries):
        if progress is not None:
            progress(number, len(entries))
        outcome = folder.kept(entry)
        if outcome is None:
            made, outcome = _made(entry, chosen, folder)
            folder.write(entry, outcome, made.image, made.labels)
        outcomes.append(outcome)
    folder.write_tables(outcomes)
    return outcomes


def _made(entry: Entry, rules: DatasetRules, folder: DatasetFolder) -> tuple[_Made, CaseOutcome]:
    """Return what a study gives, and how that ended; whatever it raises ends this study and no other."""
    made, case = _Made(), folder.name(entry.identity)
    outcome = CaseOutcome(case, "taken", group=case)
    told: list[str] = []
    try:
        check_one(entry.files)
        with warnings.catch_warnings(record=True) as caught, opened(entry.files[0], folder.private) as place:
            warnings.simplefilter("always")
            files = [*entry.files] if place == entry.files[0] else listed(place, [])
            patient = _patient_id(files)
            outcome = replace(outcome, group=folder.name(f"patient {patient}") if patient else case)
            _make(made, only_study(read_studies(files)), entry.objects, rules)
            told = [str(one.message) for one in caught if "medseg" in one.filename]
    except Exception as error:  # noqa: BLE001 - one study never stops the rest
        end = ending(error)
        outcome = replace(outcome, status=end["status"], reason=end["reason"], text=end["text"])
    return made, replace(
        outcome,
        structures=made.structures if outcome.status == "taken" else (),
        untaken=made.untaken,
        warnings=(*made.warnings, *told),
        registrations=tuple(made.registrations),
    )


def _make(made: _Made, study: Study, others: Sequence[Path], rules: DatasetRules) -> None:
    """Fill `made` with what a study gives, and objects of other studies. Raises what refuses the study."""
    objects = _objects(study, others)
    names = [name for one in objects for name in one.names]
    made.untaken = tuple(rules.untaken(names))
    objects = [one for one in objects if len(rules.untaken(one.names)) < len(one.names)]
    if not objects:
        raise InputError(
            f"None of the {len(names)} structures in the study's RTSTRUCT and SEG files matches a rule."
            if names
            else "The study has no RTSTRUCT or SEG with structures.",
            reason="no_structures",
        )
    contoured = [one for one in study.series if any(_refers(file, one) for file in objects)]
    selection = choose(study.series, rules.channels, register=rules.registration is not None, first=contoured)
    if selection.refusal is not None:
        raise selection.refusal
    first = selection.series[0]
    image, made.registrations = read_channels(selection.series)
    found = _structures([file for file in objects if _refers(file, first)], first, rules, made)
    made.labels, made.structures = _labelled(found, first, image.grid, rules)
    made.image = image


def _objects(study: Study, others: Sequence[Path]) -> list[StructureFile]:
    """Return the objects that were drawn on series of a study. Raises InputError where there are but others in it."""
    paths = {part.path for one in study.series for part in one.slices if part.modality in CONTENT}
    found = [one for path in sorted(paths.union(others)) if (one := describe_structures(path))]
    images = [one for one in study.series if one.modality not in CONTENT]
    drawn = [one for one in found if any(_refers(one, image) for image in images)]
    if found and not drawn:
        raise InputError(
            "The study's structures were drawn on series of another study. If that lies below the same folder, they "
            "count there.",
            reason="other_study",
        )
    return drawn


def _refers(file: StructureFile, series: Series) -> bool:
    """Return whether an object was drawn on a series; where it names none, whether they share a frame of reference."""
    if file.series_uids:
        return series.uid in file.series_uids
    return bool(file.frame_of_reference_uid) and file.frame_of_reference_uid == series.frame_of_reference_uid


def _structures(files: Sequence[StructureFile], series: Series, rules: DatasetRules, made: _Made) -> dict[str, Array]:
    """Return for each label that was drawn the flat indices into (slices, rows, columns) of its structures."""
    found: dict[str, list[Array]] = {}
    for file in files:
        parts, met = file.parts(series, lambda name: rules.label_of(name) is not None)
        if odd := met["askew"].total() + met["unreadable"].total():
            raise InputError(
                f"{odd} contours are not parallel to the slices or have no whole coordinates, so their structures "
                "would be incomplete.",
                reason="contours",
            )
        made.warnings += [f"{count} {told}" for kind, told in TOLD.items() if (count := met[kind].total())]
        for label, places in parts:
            rule = rules.label_of(label.name)
            if rule is not None and places.size:
                found.setdefault(rule.name, []).append(places)
            elif rule is not None:
                made.warnings.append(f"a structure for {rule.name} covers no voxel and counts as not drawn")
    for rule in rules.labels:
        _check_one(rule, len(found.get(rule.name, ())))
    made.warnings += [told for name, parts in found.items() if (told := _gaps(name, parts, series))]
    return {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}


def _check_one(rule: LabelRule, count: int) -> None:
    if count > 1 and rule.several == "refuse":
        raise InputError(
            f'{count} structures match {rule.name}. Let it take their union ("several: union"), or match fewer.',
            reason="several_structures",
        )


def _gaps(name: str, parts: Sequence[Array], series: Series) -> str:
    columns, rows = series.slices[0].shape
    slices = np.unique(np.concatenate(parts) // (columns * rows))
    missing = int(slices[-1] - slices[0]) + 1 - len(slices)
    return f"{name} is not drawn on {missing} slices between its ends" if missing else ""


def _labelled(
    found: dict[str, Array], series: Series, grid: Grid, rules: DatasetRules
) -> tuple[Volume, tuple[str, ...]]:
    """Return the label map of a case, and the labels that were drawn."""
    table = make_labels((value, rule.name) for value, rule in enumerate(rules.labels, start=1))
    values = np.zeros(grid.shape[0] * grid.shape[1] * series.n_slices, np.min_scalar_type(len(table)))
    drawn = [label for label in table if label.name in found]
    for label in drawn:
        places = found[label.name]
        shared = int(np.count_nonzero(values[places]))
        if shared and rules.overlap == "refuse":
            raise InputError(
                f'{label.name} shares {shared} voxels with labels before it. Let the later one win ("overlap: later"), '
                "or take fewer labels.",
                reason="overlap",
            )
        values[places] = label.value
    if not drawn:
        raise InputError("The structures that match a rule cover no voxel.", reason="no_structures")
    parts = [(label, np.flatnonzero(values == label.value)) for label in drawn]
    return volume_of(parts, grid, series.heights), tuple(label.name for label in drawn)


def _patient_id(files: Sequence[Path]) -> str:
    """Return the PatientID of the first DICOM file, "" where it states none."""
    for file in files:
        with parsing(file), file.open("rb") as opened:
            if begins_as_dicom(opened):
                return str(read_data(file, ["PatientID"]).get("PatientID") or "")
    return ""
