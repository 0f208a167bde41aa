"""Trainings that begin with a model: its plan with the labels of a dataset, and its weights."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path

from medseg.errors import ModelError
from medseg.model.plan import Channel, Plan
from medseg.model.stored import find_model
from medseg.networks.kinds import AnyNetwork, Network
from medseg.train.architectures import heads_for
from medseg.train.dataset import Dataset, Fold
from medseg.train.fingerprint import Fingerprint, names_digest
from medseg.train.planner import mirror_axes, normalization
from medseg.train.settings import TrainSettings


def plan_from(start: str | PathLike[str], dataset: Dataset, facts: Fingerprint | None = None) -> Plan:
    """Return the plan of a model for the labels and channels of a dataset, to train it further.

    Its clean-up was of other labels, and goes. Heads of lower resolutions, which imported models lack, come back.
    Without the dataset's fingerprint, names alone say whether a label has a side, so that nothing may be mirrored.
    Raises ModelError for a model that needs another one before it, and for other channels without the fingerprint.
    """
    plan = Plan.load(find_model(start) / "plan.json")
    if plan.previous:
        raise ModelError(
            "The model to begin with sees the labels of another model, which a training cannot give it. Begin with "
            "that one, or train from the beginning.",
            path=start,
            reason="unsupported",
        )
    return plan.model_copy(
        update={
            "channels": _channels(plan, dataset, facts),
            "network": _with_heads(plan.network),
            "name": dataset.name,
            "labels": dataset.labels,
            "regions": dataset.meaning.regions,
            "mirror_axes": plan.mirror_axes if mirror_axes(dataset.labels, facts.cases if facts else ()) else (),
            "crf": None,
            "keep_largest": (),
        }
    )


def _channels(plan: Plan, dataset: Dataset, facts: Fingerprint | None) -> tuple[Channel, ...]:
    """Return the channels of a dataset, each normalized as the model does it with the channel of that name, if any.

    As many channels of which none has a known name are taken for those of the model, in its order.
    """
    known = {channel.name.casefold(): channel for channel in plan.channels}
    names = [name.casefold() for name in dataset.channels]
    if len(names) == len(known) and not known.keys() & set(names):
        return plan.channels
    if set(names) <= known.keys():
        return tuple(known[name] for name in names)
    if facts is None:
        raise ModelError(
            f"The dataset has channels that the model to begin with does not take ({len(names)} and {len(known)}), and "
            "how to normalize them is not known without its fingerprint.",
            reason="channels",
        )
    return tuple(
        known.get(name.casefold(), Channel(name=name, normalization=normalization(name, numbers)))
        for name, numbers in zip(dataset.channels, facts.intensities, strict=True)
    )


def _with_heads(network: AnyNetwork) -> AnyNetwork:
    """Return a network with the outputs of lower resolutions that a training learns from, where it has none."""
    if not isinstance(network, Network) or network.heads:
        return network
    return network.model_copy(update={"heads": heads_for(len(network.features))})


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
