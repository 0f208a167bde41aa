"""Training, from a plan to a model folder."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from medseg.errors import ModelError, OutputError
from medseg.io.files import written_whole
from medseg.model.plan import Plan
from medseg.model.segmenter import Model, pick_device
from medseg.model.weights import find_model, save_weights
from medseg.report.metrics import Scores
from medseg.train.cache import prepare_cases
from medseg.train.card import write_card
from medseg.train.checkpoint import TrainState
from medseg.train.dataset import Case, Dataset, read_dataset
from medseg.train.evaluate import evaluate
from medseg.train.fingerprint import fingerprint
from medseg.train.optimize import new_state, optimize
from medseg.train.planner import make_plan
from medseg.train.ranks import joined
from medseg.train.sampler import Sampler
from medseg.train.settings import Budget, TrainSettings

HISTORY_STEPS = 50
"""Steps that one line of the history sums up."""

CHECKPOINT_S = 60.0
"""Seconds between two checkpoints: the work that a crash can cost."""


@dataclass(frozen=True)
class TrainProgress:
    """Where a training is: its stage ("look", "prepare", "train", "validate"), the share done, the numbers of now."""

    stage: str
    done: float
    step: int = 0
    loss: float = math.nan
    steps_per_s: float = math.nan
    seconds_left: float = math.nan


Progress = Callable[[TrainProgress], None]


def train_dataset(  # noqa: PLR0913 - each is a decision of the user's
    dataset: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    budget: str = "30m",
    fold: int = 0,
    folds: int = 5,
    start: str | PathLike[str] | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Return the validation scores of fold `fold` of `folds` of a dataset folder, planned and trained into `folder`.

    A plan.json that is in the folder is followed, and a train.json too but for the number of folds: edit them to
    decide otherwise. With `start`, a model, its plan is followed with the labels of the dataset, and its weights are
    where the training begins.
    Under torchrun several processes train it together; the first one writes, validates and returns the scores.
    Raises what `read_dataset`, `fingerprint` and `train_model` raise.
    """
    where = Path(folder)
    settings_file = where / "train.json"
    with joined() as ranks:
        progress = progress if ranks.is_first else None
        with ranks.first_alone():
            cases, plan = plan_dataset(dataset, where, start=start, progress=progress)
        settings = TrainSettings.load(settings_file) if settings_file.is_file() else TrainSettings()
        settings = settings.model_copy(update={"folds": folds})
        model = train_model(
            cases,
            plan,
            where,
            budget=budget,
            fold=fold,
            settings=settings,
            start=start,
            device=device,
            progress=progress,
        )
        return validate_fold(model, cases, where, fold=fold, progress=progress) if ranks.is_first else Scores(())


def plan_dataset(
    dataset: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    start: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Dataset, Plan]:
    """Return a dataset and the plan of a model folder, which is made, with fingerprint.json, where it is not there.

    With `start` it is the plan of that model with the labels of the dataset.
    Raises what `read_dataset`, `fingerprint` and `plan_from` raise.
    """
    where = Path(folder)
    cases = read_dataset(dataset)
    if not (where / "plan.json").is_file():
        facts = fingerprint(cases, progress=_in_stage("look", progress))
        _make_folder(where)
        facts.save(where / "fingerprint.json")
        (make_plan(facts) if start is None else plan_from(start, cases)).save(where / "plan.json")
    return cases, Plan.load(where / "plan.json")


def train_model(  # noqa: PLR0913 - each is a decision of the user's
    dataset: Dataset,
    plan: Plan,
    folder: str | PathLike[str],
    *,
    budget: str = "30m",
    fold: int = 0,
    settings: TrainSettings | None = None,
    start: str | PathLike[str] | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Return a model trained on one fold of a dataset and write it to `folder`; go on where an earlier run stopped.

    `budget` is a time ("30m", "8h": of training itself, not of preparing or being switched off) or a number of steps
    ("500steps", "20epochs" of 250). The folder gets plan.json, train.json, fold_N.safetensors and fold_N.history.csv;
    a fold whose weights are there is not trained again. The first weights are random, or those of the model `start`.
    Raises ModelError where the folder holds another plan or the training diverges, and what reading a case raises.
    """
    settings = settings or TrainSettings()
    limit = Budget.parse(budget)
    if plan.regions or plan.previous:
        raise ModelError("A plan with overlapping regions or a previous stage can be used, but not trained.")
    where = Path(folder)
    training, _ = dataset.fold(fold, settings.folds)
    weights = where / f"fold_{fold}.safetensors"
    with joined() as ranks:
        if ranks.is_first:
            _claim_folder(where, plan, settings)
        if not ranks.agreed(weights.is_file()):
            state = new_state(plan, settings, pick_device(device), start)
            files = _Files(where, fold, _recipe(plan, settings, limit, training), writes=ranks.is_first)
            files.resume(state)
            with ranks.first_alone():
                prepared = prepare_cases(training, plan, where / "cache", progress=_in_stage("prepare", progress))
            sampler = Sampler(prepared, plan, settings.seed, settings.foreground)
            _train(state, optimize(state, sampler, settings, limit, ranks), limit, files, progress)
            files.finish(state)
        ranks.wait()
    # The other folds of the folder have seen the cases that this one is validated on.
    return Model.load(where, device=device, folds=(fold,))


def validate_fold(
    model: Model, dataset: Dataset, folder: str | PathLike[str], *, fold: int = 0, progress: Progress | None = None
) -> Scores:
    """Return the scores on the cases that a fold kept aside; write fold_N.scores.json and, if new, MODEL_CARD.md.

    Raises ModelError where the folder has no such fold, and what `evaluate` raises.
    """
    where = Path(folder)
    settings = TrainSettings.load(where / "train.json")
    _, validation = dataset.fold(fold, settings.folds)
    scores = evaluate(model, validation, progress=_in_stage("validate", progress))
    with written_whole(where / f"fold_{fold}.scores.json") as beside:
        beside.write_text(json.dumps(scores.to_dict(), indent=1) + "\n", encoding="utf-8")
    write_card(where, model.plan, dataset.name, len(dataset))
    return scores


def plan_from(start: str | PathLike[str], dataset: Dataset) -> Plan:
    """Return the plan of a model with the labels of a dataset, to train it further.

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
    return plan.model_copy(update={"name": dataset.name, "labels": dataset.labels, "regions": ()})


@dataclass(frozen=True)
class _Files:
    """What a training of a fold leaves on the disk; of several processes one writes."""

    folder: Path
    fold: int
    recipe: str
    writes: bool

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"fold_{self.fold}.checkpoint"

    def resume(self, state: TrainState) -> None:
        if self.checkpoint.is_file():
            state.load(self.checkpoint, self.recipe)

    def save(self, state: TrainState) -> None:
        if self.writes:
            state.save(self.checkpoint, self.recipe)

    def finish(self, state: TrainState) -> None:
        if self.writes:
            _write_history(state.history, self.folder / f"fold_{self.fold}.history.csv")
            save_weights(state.average, self.folder / f"fold_{self.fold}.safetensors")
            self.checkpoint.unlink(missing_ok=True)


def _train(
    state: TrainState, losses: Iterator[float], budget: Budget, files: _Files, progress: Progress | None
) -> None:
    """Run the training: history, progress, and a checkpoint each minute, at the end, and when it is interrupted."""
    saved = time.monotonic()
    recent: list[float] = []
    began_step, began_seconds = state.step, state.seconds
    try:
        for loss in losses:
            recent = [*recent[1 - HISTORY_STEPS :], loss]
            done = budget.spent(state.step, state.seconds)
            speed = (state.step - began_step) / max(1e-9, state.seconds - began_seconds)
            mean = sum(recent) / len(recent)
            left = state.seconds * (1 - done) / max(done, 1e-9)
            if progress:
                progress(TrainProgress("train", min(1.0, done), state.step, mean, speed, max(0.0, left)))
            if state.step % HISTORY_STEPS == 0:
                rate = float(state.optimizer.param_groups[0]["lr"])
                state.history.append(
                    {
                        "step": state.step,
                        "seconds": state.seconds,
                        "loss": mean,
                        "learning_rate": rate,
                        "steps_per_s": speed,
                    }
                )
            if time.monotonic() - saved > CHECKPOINT_S:
                files.save(state)
                saved = time.monotonic()
    except KeyboardInterrupt:
        files.save(state)
        raise
    files.save(state)


def _claim_folder(where: Path, plan: Plan, settings: TrainSettings) -> None:
    _make_folder(where)
    for name, content in (("plan.json", plan), ("train.json", settings)):
        file = where / name
        if not file.is_file():
            content.save(file)
        elif type(content).load(file) != content:
            raise ModelError(
                f"The folder holds a model with another {name}. Train into another folder, or delete this one.",
                path=file,
            )


def _recipe(plan: Plan, settings: TrainSettings, budget: Budget, cases: Sequence[Case]) -> str:
    parts = (
        plan.model_dump_json(),
        settings.model_dump_json(),
        budget.model_dump_json(),
        *(f"{case.name} {sorted(case.undrawn)}" for case in cases),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _make_folder(where: Path) -> None:
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The model folder cannot be made: {error.strerror}.", path=where) from error


def _in_stage(stage: str, progress: Progress | None) -> Callable[[int, int], None]:
    return lambda done, total: progress(TrainProgress(stage, done / total)) if progress else None


def _write_history(history: Sequence[dict[str, float]], path: Path) -> None:
    with written_whole(path) as beside, beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["step", "seconds", "loss", "learning_rate", "steps_per_s"])
        writer.writeheader()
        writer.writerows(history)
