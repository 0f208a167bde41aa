"""Label maps against references: counts and scores for every case and label, and their means.

One decision about structures that are not there: where neither the prediction nor the reference has the label, its
scores are NaN (None in JSON) and left out of every mean; where only one of them has it, its scores are 0 and the
distances between surfaces are the diagonal of the image. Beside each mean stands from how many cases it is, and in how
many of them the structure was missed, or invented.
A case without a usable prediction has failed. It counts as one in which nothing was found, and is never left out.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError, MedsegError, UsageError
from medseg.io import VOLUME_ENDINGS, load
from medseg.io.files import reading, written_whole
from medseg.labels import Label, label_map, make_labels
from medseg.report.measurements import measure
from medseg.report.surfaces import compare_surfaces
from medseg.volume import Volume

COUNTS = ("true_positives", "false_positives", "false_negatives")
VOLUMES = ("volume_reference_ml", "volume_predicted_ml", "volume_difference_ml", "volume_error_ml")
SURFACES = ("surface_dice", "hd95_mm", "mean_surface_mm")
SCORES = ("dice", "iou", "precision", "recall", *VOLUMES, *SURFACES)

TOLERANCE_MM = 2.0
"""How far surfaces may lie apart for the surface Dice unless it is said otherwise."""

Members = Mapping[int, Sequence[int]]
"""For the value of a label, the values in label maps that it is made of."""

RESAMPLES, RESAMPLING_SEED = 2000, 12345


@dataclass(frozen=True)
class LabelScore:
    """How well one label was found in one case: the voxel counts, and the scores that follow from them."""

    value: int
    name: str
    true_positives: int
    false_positives: int
    false_negatives: int
    voxel_mm3: float
    surface_dice: float = math.nan
    hd95_mm: float = math.nan
    mean_surface_mm: float = math.nan

    @property
    def status(self) -> Literal["found", "missed", "invented", "absent"]:
        """Whether the label is in both volumes, in the reference alone, in the prediction alone, or in neither."""
        predicted, there = self.volume_predicted_ml > 0, self.volume_reference_ml > 0
        return ("found" if predicted else "missed") if there else "invented" if predicted else "absent"

    @property
    def dice(self) -> float:
        """Twice the common voxels over the sum of both."""
        common = 2 * self.true_positives
        return self._ratio(common, common + self.false_positives + self.false_negatives)

    @property
    def iou(self) -> float:
        """The common voxels over those of either: intersection over union, the Jaccard index."""
        return self._ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)

    @property
    def precision(self) -> float:
        """The part of the prediction that is right."""
        return self._ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """The part of the reference that was found: the sensitivity."""
        return self._ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def volume_reference_ml(self) -> float:
        """Volume in the reference in ml; never NaN."""
        return (self.true_positives + self.false_negatives) * self.voxel_mm3 / 1000

    @property
    def volume_predicted_ml(self) -> float:
        """Volume in the prediction in ml; never NaN."""
        return (self.true_positives + self.false_positives) * self.voxel_mm3 / 1000

    @property
    def volume_difference_ml(self) -> float:
        """Predicted minus reference volume in ml, positive where too much was found; never NaN.

        Its mean over cases is the bias: too much in one case and too little in another cancel.
        """
        return (self.false_positives - self.false_negatives) * self.voxel_mm3 / 1000

    @property
    def volume_error_ml(self) -> float:
        """The absolute difference of both volumes in ml; never NaN. Its mean over cases hides no error."""
        return abs(self.volume_difference_ml)

    def to_dict(self) -> dict[str, Any]:
        """Return value, name, counts and scores as JSON takes them."""
        scores = {key: getattr(self, key) for key in (*COUNTS, *SCORES)}
        return {"value": self.value, "name": self.name, "status": self.status} | _without_nan(scores)

    def _ratio(self, part: int, whole: int) -> float:
        if not (self.true_positives or self.false_positives or self.false_negatives):
            return math.nan
        return part / whole if whole else 0.0


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case; `failure` is the reason code where there was no usable prediction.

    Cases of one `group` (a patient) are not independent; without one a case is a group of its own.
    """

    name: str
    labels: tuple[LabelScore, ...]
    failure: str | None = None
    group: str = ""


@dataclass(frozen=True)
class Scores:
    """The scores of all cases, and their means."""

    cases: tuple[CaseScores, ...]

    @property
    def failed(self) -> tuple[CaseScores, ...]:
        """The cases without a usable prediction."""
        return tuple(case for case in self.cases if case.failure is not None)

    @property
    def label_means(self) -> dict[int, dict[str, float]]:
        """The mean of every score over the cases, for each label value."""
        found: dict[int, list[LabelScore]] = {}
        for score in (score for case in self.cases for score in case.labels):
            found.setdefault(score.value, []).append(score)
        return {
            value: {key: _mean(getattr(score, key) for score in found[value]) for key in SCORES}
            for value in sorted(found)
        }

    @property
    def label_counts(self) -> dict[int, dict[str, int]]:
        """For each label value, from how many `cases` its means are, in how many it was `missed` or `invented`.

        Of `surface_cases` are those of its surface scores: surfaces that ignored voxels cut are not compared. Means of
        volumes are over all cases in which the label was drawn.
        """
        counts: dict[int, dict[str, int]] = {}
        for score in (score for case in self.cases for score in case.labels):
            row = counts.setdefault(score.value, dict.fromkeys(("cases", "surface_cases", "missed", "invented"), 0))
            row["cases"] += score.status != "absent"
            row["surface_cases"] += not math.isnan(score.surface_dice)
            for status in ("missed", "invented"):
                row[status] += score.status == status
        return dict(sorted(counts.items()))

    @property
    def mean(self) -> dict[str, float]:
        """The mean over labels of `label_means`: a rare label counts as much as one that every case has."""
        means = self.label_means.values()
        return {key: _mean(label[key] for label in means) for key in SCORES}

    def interval(self, value: int, key: str = "dice") -> tuple[float, float]:
        """Return where the mean of a score of a label lies with 95 % confidence: a bootstrap over groups of cases.

        NaN where fewer than two groups have the score. Source: Efron and Tibshirani, "An introduction to the
        bootstrap", 1993 (percentile interval).
        """
        by_group: dict[str, list[float]] = {}
        for case in self.cases:
            scores = [getattr(score, key) for score in case.labels if score.value == value]
            by_group.setdefault(case.group or case.name, []).extend(one for one in scores if not math.isnan(one))
        groups = [values for values in by_group.values() if values]
        if len(groups) < 2:
            return math.nan, math.nan
        sums, counts = np.array([sum(values) for values in groups]), np.array([len(values) for values in groups])
        drawn = np.random.default_rng(RESAMPLING_SEED).integers(len(groups), size=(RESAMPLES, len(groups)))
        low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (2.5, 97.5))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Return the means with the interval of Dice, the failed cases and every case as JSON takes them."""
        names = {score.value: score.name for case in self.cases for score in case.labels}
        means, counts = self.label_means, self.label_counts
        totals = {key: sum(row[key] for row in counts.values()) for key in ("missed", "invented")}
        return {
            "mean": _without_nan(self.mean) | {"labels": sum(row["cases"] > 0 for row in counts.values())} | totals,
            "labels": [
                {"value": value, "name": names[value]}
                | counts[value]
                | _without_nan(means[value] | dict(zip(("dice_low", "dice_high"), self.interval(value), strict=True)))
                for value in means
            ],
            "failed": [{"case": case.name, "reason": case.failure} for case in self.failed],
            "cases": [{"case": case.name, "labels": [score.to_dict() for score in case.labels]} for case in self.cases],
        }


def compare_labels(
    predicted: Volume,
    reference: Volume,
    labels: Sequence[Label],
    *,
    tolerance_mm: float | None = TOLERANCE_MM,
    members: Members | None = None,
    ignore: int | None = None,
) -> list[LabelScore]:
    """Return one score for each label, in the order of the table; other values in the volumes count as background.

    `tolerance_mm` is how far surfaces may lie apart for the surface Dice; with None they are not compared. `members`
    are the values that make up a label, where that is more than its own: a region, all of which are joined in both
    volumes. Voxels that are `ignore` in the reference do not count; where there are any, surfaces, which they would
    cut, are not compared (NaN).

    Raises GeometryError (`other_grid`) where the grids differ, InputError where a volume is no label map, UsageError
    for a tolerance that is no distance.
    """
    if tolerance_mm is not None and not 0 <= tolerance_mm < math.inf:
        raise UsageError(f"A tolerance is a distance in mm from 0; not {tolerance_mm}.")
    if not predicted.grid.matches(reference.grid):
        raise GeometryError(
            f"The prediction, of shape {predicted.grid.shape}, lies on another grid than the reference, of shape "
            f"{reference.grid.shape}. Resample it onto the grid of the reference first.",
            reason="other_grid",
        )
    found, truth = label_map(predicted), label_map(reference)
    left_out = truth == ignore if ignore is not None else np.zeros((), bool)
    if left_out.any():
        found, truth = np.where(left_out, 0, found), np.where(left_out, 0, truth)
    joined = {label.value: (members or {}).get(label.value, (label.value,)) for label in labels}
    values = sorted({value for some in joined.values() for value in some})
    joint = _joint_histogram(found, truth, values)
    scores = []
    for label in labels:
        places = [1 + values.index(value) for value in joined[label.value]]
        common = int(joint[np.ix_(places, places)].sum())
        wrong, missed = int(joint[places].sum()) - common, int(joint[:, places].sum()) - common
        apart: tuple[float, float, float] = (math.nan, math.nan, math.nan)
        if tolerance_mm is not None and not left_out.any():
            own, other = (_mask(volume, joined[label.value]) for volume in (found, truth))
            surface = compare_surfaces(own, other, reference.grid, tolerance_mm)
            apart = (surface.dice, surface.hd95_mm, surface.mean_mm)
        scores.append(LabelScore(label.value, label.name, common, wrong, missed, reference.grid.voxel_mm3, *apart))
    return scores


def evaluate_folder(
    predictions: str | PathLike[str],
    references: str | PathLike[str],
    labels: Sequence[Label] | None = None,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    members: Members | None = None,
    ignore: int | None = None,
) -> Scores:
    """Return the scores of every reference NAME.nii.gz (.nii, .nrrd, .mha), set against the prediction of that NAME.

    A prediction that is missing, unreadable or on another grid is a failed case; one without a reference is not looked
    at. Without a label table, every value that occurs in some reference, or in the prediction of one, is scored, as
    "label N": what is nowhere in the references was invented. `members` and `ignore` are those of `compare_labels`.
    Raises UsageError for what is no folder, DatasetError for a folder without references or with one NAME twice,
    InputError for a reference that cannot be read.
    """
    given, wanted = _files_by_name(Path(predictions)), _files_by_name(Path(references))
    if not wanted:
        raise DatasetError(f"The folder of references holds no {', '.join(VOLUME_ENDINGS)} file.", path=references)
    table = _labels_in(wanted, given) if labels is None else labels
    compare = partial(compare_labels, labels=table, tolerance_mm=tolerance_mm, members=members, ignore=ignore)
    return Scores(tuple(_score_case(name, given.get(name), file, compare) for name, file in wanted.items()))


def write_scores_csv(scores: Scores, path: str | PathLike[str]) -> None:
    """Write one line for each case and label, with an empty cell for a score that is NaN. Raises OutputError."""
    with written_whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["case", "failure", "value", "name", "status", *COUNTS, *SCORES])
        writer.writeheader()
        for case in scores.cases:
            writer.writerows({"case": case.name, "failure": case.failure} | score.to_dict() for score in case.labels)


def _joint_histogram(
    predicted: NDArray[np.integer[Any]], reference: NDArray[np.integer[Any]], values: Sequence[int]
) -> NDArray[np.int64]:
    """Return how many voxels are (row in the prediction, column in the reference); 0 stands for all other values.

    Voxels that are background in both are not counted: no score needs them.
    """
    known = np.array([0, *values])
    joint = np.zeros(len(known) ** 2, dtype=np.int64)
    for k in range(reference.shape[2]):  # slice by slice, so that the index arrays stay small
        p, r = predicted[:, :, k], reference[:, :, k]
        marked = (p > 0) | (r > 0)
        pairs = _places(p[marked], known) * len(known) + _places(r[marked], known)
        joint += np.bincount(pairs, minlength=joint.size)
    return joint.reshape(len(known), len(known))


def _mask(volume: NDArray[np.integer[Any]], values: Sequence[int]) -> NDArray[np.bool_]:
    return np.asarray(volume == values[0] if len(values) == 1 else np.isin(volume, values))


def _places(voxels: NDArray[np.integer[Any]], known: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return where in `known` each value stands; 0, the place of background, for values that are not there."""
    order = np.argsort(known)
    nearest = np.minimum(np.searchsorted(known, voxels, sorter=order), len(known) - 1)
    return np.where(known[order[nearest]] == voxels, order[nearest], 0)


def _score_case(
    name: str, prediction: Path | None, reference: Path, compare: Callable[[Volume, Volume], list[LabelScore]]
) -> CaseScores:
    truth = _load_labels(reference)
    nothing = truth.with_array(np.zeros_like(truth.array))
    if prediction is None:
        return CaseScores(name, tuple(compare(nothing, truth)), failure="missing")
    try:
        return CaseScores(name, tuple(compare(load(prediction), truth)))
    except MedsegError as error:
        return CaseScores(name, tuple(compare(nothing, truth)), failure=error.reason)


def _load_labels(path: Path) -> Volume:
    with reading(path):
        volume = load(path)
        return volume.with_array(label_map(volume)[np.newaxis])


def _labels_in(references: Mapping[str, Path], predictions: Mapping[str, Path]) -> tuple[Label, ...]:
    found = {(one.value, one.name) for path in references.values() for one in measure(_load_labels(path), ())}
    for path in (predictions[name] for name in references if name in predictions):
        with suppress(MedsegError):  # that case has failed, and will be scored so
            found |= {(one.value, one.name) for one in measure(_load_labels(path), ())}
    return make_labels(found)


def _files_by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError("Predictions and references are two folders; one of them is not there.", path=folder)
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        ending = next((ending for ending in VOLUME_ENDINGS if file.name.lower().endswith(ending)), None)
        if ending is None or file.name.startswith("."):
            continue
        name = file.name[: -len(ending)]
        if name in files:
            raise DatasetError("Two files of one name differ only in their ending; keep one of them.", path=file)
        files[name] = file
    return files


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _without_nan(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in numbers.items()}
