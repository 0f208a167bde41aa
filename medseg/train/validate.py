"""Folds scored on the cases that they kept aside, alone and pooled, and the clean-up that this speaks for.

The label maps stay in MODEL/validation until weights or images change: like the cache they are patients' data, and may
be deleted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import MedsegError, ModelError, UsageError
from medseg.io import load, save
from medseg.io.files import written_whole
from medseg.model.plan import Plan
from medseg.model.segmenter import Model
from medseg.process.cleanup import keep_largest_piece
from medseg.report.metrics import TOLERANCE_MM, CaseScores, Scores, write_scores_csv
from medseg.report.pictures import draw_overlay
from medseg.train.card import write_card
from medseg.train.check import read_image
from medseg.train.dataset import Case, Dataset
from medseg.train.evaluate import compare_case
from medseg.train.postprocess import choose_largest
from medseg.train.run import Progress, TrainProgress
from medseg.train.settings import TrainSettings
from medseg.volume import Volume

Groups = tuple[tuple[int, ...], ...]


def validate_fold(
    model: Model, dataset: Dataset, folder: str | PathLike[str], *, fold: int = 0, progress: Progress | None = None
) -> Scores:
    """Return the scores on the cases that a fold kept aside; write what they are, and the table of MODEL_CARD.md.

    The folder gets fold_N.scores.json and fold_N.scores.csv, in which cases have numbers. In validation/ are the same
    with their names, the label maps in fold_N and, with matplotlib, pictures of the worst and the middle case. A case
    that cannot be segmented has failed.
    Raises ModelError where the folder has no recipe, and what reading a reference raises.
    """
    scores = score_fold(model, dataset, Path(folder), fold, progress)
    write_card(Path(folder), model.plan, dataset.name, len(dataset))
    return scores


def score_fold(model: Model, dataset: Dataset, where: Path, fold: int, progress: Progress | None = None) -> Scores:
    """Return the scores of `validate_fold`, and write all but the card."""
    settings = TrainSettings.load(where / "train.json")
    _, validation = dataset.fold(fold, settings.folds)
    raw = copy.copy(model)  # the choice of what to clean up needs label maps as the network gives them
    raw.plan = model.plan.model_copy(update={"keep_largest": ()})
    scored = []
    for done, case in enumerate(validation, start=1):
        failure = _segment(raw, case, _prediction(where, fold, case), where / f"fold_{fold}.safetensors")
        scored.append(_score(case, _prediction(where, fold, case), model.plan, failure))
        if progress:
            progress(TrainProgress("validate", done / len(validation), fold=fold))
    scores = Scores(tuple(scored))
    _write(scores, where, f"fold_{fold}.scores", {})
    _draw_examples(scores, validation, where, fold, model.plan)
    return scores


def cross_validate(
    dataset: Dataset, folder: str | PathLike[str], *, device: str | None = None, progress: Progress | None = None
) -> Scores:
    """Return the scores of every case by the fold that did not train on it, with the clean-up that they speak for.

    All folds must be trained. Those that are not scored yet are. The largest piece of all labels, and then of each, is
    kept where that raises the mean Dice over all cases (`postprocess.choose_largest`): the plan gets it as
    `keep_largest`, scores.json says what was tried. The folder gets scores.json and scores.csv.
    Raises ModelError where a fold has no weights, and what `validate_fold` raises.
    """
    where = Path(folder)
    folds = TrainSettings.load(where / "train.json").folds
    missing = [str(fold) for fold in range(folds) if not (where / f"fold_{fold}.safetensors").is_file()]
    if missing:
        raise ModelError(
            f"Of {folds} folds these are not trained: {', '.join(missing)}. Train them first.",
            path=where,
            reason="fold",
        )
    for fold in range(folds):
        if not is_scored(dataset, where, fold):
            score_fold(Model.load(where, device=device, folds=(fold,)), dataset, where, fold, progress)
    plan = Plan.load(where / "plan.json")
    cases = [(case, _prediction(where, fold, case)) for fold in range(folds) for case in dataset.fold(fold, folds)[1]]
    groups, tried = choose_largest(cases, plan, load_prediction)
    plan = plan.model_copy(update={"keep_largest": groups})
    plan.save(where / "plan.json")
    scored = []
    for done, (case, file) in enumerate(cases, start=1):
        scored.append(_score(case, file, plan, None))
        if progress:
            progress(TrainProgress("score", done / len(cases)))
    scores = Scores(tuple(scored))
    _write(scores, where, "scores", {"folds": folds, "postprocessing": tried})
    write_card(where, plan, dataset.name, len(dataset))
    return scores


def is_scored(dataset: Dataset, where: Path, fold: int) -> bool:
    """Return whether the scores of a fold are there, and of the weights, images and labels that are there."""
    _, validation = dataset.fold(fold, TrainSettings.load(where / "train.json").folds)
    files = [file for case in validation for _, file in case.files]
    scores = where / f"fold_{fold}.scores.json"
    return is_newer(scores, where / f"fold_{fold}.safetensors", sources=files)


def load_prediction(file: Path, reference: Volume) -> tuple[Volume, str | None]:
    """Return the label map of a case, or nothing found and the reason for which there is none."""
    try:
        found = load(file)
        return found.with_array(np.array(found.array)), None
    except MedsegError as error:
        return reference.with_array(np.zeros(reference.array.shape, np.uint8)), error.reason


def _prediction(where: Path, fold: int, case: Case) -> Path:
    return where / "validation" / f"fold_{fold}" / f"{case.name}.nii.gz"


def _segment(model: Model, case: Case, target: Path, weights: Path) -> str | None:
    """Write the label map of a case, unless it is there; return the reason where it cannot be made."""
    if is_newer(target, weights, sources=case.images):
        return None
    try:
        labels = model.segment(read_image(case))
    except MedsegError as error:
        target.unlink(missing_ok=True)
        return error.reason
    target.parent.mkdir(parents=True, exist_ok=True)
    save(labels, target)
    return None


def is_newer(file: Path, *others: Path, sources: Iterable[Path] = ()) -> bool:
    """Return whether a file is there and was written before none of the others and sources that are there.

    Of sources the time counts at which they came to be there: a copy may keep the time of what it was copied from.
    """
    if not file.is_file():
        return False
    written = file.stat().st_mtime_ns
    times = chain((other.stat().st_mtime_ns for other in others if other.is_file()), map(_there_since, sources))
    return all(written >= time for time in times)


def _there_since(file: Path) -> int:
    """Return when a file, or the link that leads to it, was last put in place or changed; 0 for none."""
    if not file.is_file():
        return 0
    return max(time for stat in (file.stat(), file.lstat()) for time in (stat.st_mtime_ns, stat.st_ctime_ns))


def _score(case: Case, file: Path, plan: Plan, failure: str | None) -> CaseScores:
    reference = load(case.label)
    found, missing = load_prediction(file, reference)
    for group in plan.keep_largest:
        keep_largest_piece(found.array[0], group)
    return compare_case(found, reference, case, plan, TOLERANCE_MM, failure or missing)


def _write(scores: Scores, where: Path, stem: str, more: dict[str, Any]) -> None:
    """Write scores under the names of cases to validation/, and under numbers to the folder, which may be shared."""
    numbered = Scores(tuple(replace(case, name=f"case {n}") for n, case in enumerate(scores.cases, start=1)))
    (where / "validation").mkdir(exist_ok=True)
    for written, folder in ((scores, where / "validation"), (numbered, where)):
        write_scores_csv(written, folder / f"{stem}.csv")
        with written_whole(folder / f"{stem}.json") as beside:
            beside.write_text(json.dumps(written.to_dict() | more, indent=1) + "\n", encoding="utf-8")


def _draw_examples(scores: Scores, cases: Sequence[Case], where: Path, fold: int, plan: Plan) -> None:
    """Draw the worst and the middle case by mean Dice: what was found, and the reference."""
    dice = {case.name: Scores((case,)).mean["dice"] for case in scores.cases if case.failure is None}
    order = sorted((case for case in cases if dice.get(case.name, np.nan) >= 0), key=lambda case: dice[case.name])
    chosen = {"worst": 0, "middle": len(order) // 2} if order else {}
    for name, place in chosen.items():
        case, stem = order[place], where / "validation" / f"fold_{fold}.{name}"
        image, reference = read_image(case), load(case.label)
        found, _ = load_prediction(_prediction(where, fold, case), reference)
        for labels, kind in ((found, "found"), (reference, "reference")):
            title = f"{case.name}: {kind}, Dice {dice[case.name]:.3f}"
            try:
                draw_overlay(image, labels, plan.labels, stem.with_name(f"{stem.name}.{kind}.png"), title=title)
            except UsageError:
                return  # without matplotlib there are no pictures
