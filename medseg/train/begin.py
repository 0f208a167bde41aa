"""Trainings that begin with a model: its plan with the labels of a dataset, and its weights."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path

from medseg.errors import ModelError
from medseg.model.plan import Plan
from medseg.model.stored import find_model
from medseg.train.dataset import Dataset, Fold
from medseg.train.fingerprint import Fingerprint, names_digest
from medseg.train.planner import mirror_axes
from medseg.train.settings import TrainSettings


def plan_from(start: str | PathLike[str], dataset: Dataset, facts: Fingerprint | None = None) -> Plan:
    """Return the plan of a model with the labels of a dataset, to train it further; its clean-up was of other labels.

    Without its fingerprint, names alone say whether a label has a side, so that nothing may be mirrored.
    Raises ModelError where the dataset has other channels than the model.
    """
    plan = Plan.load(find_model(start) / "plan.json")
    if len(plan.channels) != len(dataset.channels):
        raise ModelError(
            f"The model to begin with takes {len(plan.channels)} channel(s) and the dataset has "
            f"{len(dataset.channels)}. Give a model of the same channels, or train from the beginning.",
            path=start,
            reason="channels",
        )
    return plan.model_copy(
        update={
            "name": dataset.name,
            "labels": dataset.labels,
            "regions": dataset.meaning.regions,
            "mirror_axes": plan.mirror_axes if mirror_axes(dataset.labels, facts.cases if facts else ()) else (),
            "crf": None,
            "keep_largest": (),
        }
    )


def weights_to_begin_with(start: str | PathLike[str], fold: Fold) -> Path:
    """Return the file of a model's weights of the same fold, which have not seen the cases kept aside, or the first.

    Raises ModelError where the model has no weights.
    """
    where = find_model(start)
    files = sorted(where.glob("fold_*.safetensors"))
    if not files:
        raise ModelError("The model to begin with has no weights.", path=where)
    same = where / f"fold_{fold}.safetensors"
    return same if same in files else files[0]


def warn_of_seen(start: str | PathLike[str], dataset: Dataset, fold: Fold, folds: int) -> None:
    """Warn where the model to begin with was trained on cases that a fold of the same dataset keeps aside."""
    where = find_model(start)
    try:
        facts, kept = Fingerprint.load(where / "fingerprint.json"), TrainSettings.load(where / "train.json")
    except ModelError:
        return  # nothing is known of what it was trained on
    if fold == "none" or facts.names_sha256 != names_digest(dataset):
        return
    if kept.folds != folds or not (where / f"fold_{fold}.safetensors").is_file():
        warnings.warn(
            "The model to begin with was trained on cases that are kept aside here: its scores will flatter it. Begin "
            f"with one that was trained on fold {fold} of {folds} of this dataset, or on other cases.",
            stacklevel=2,
        )
