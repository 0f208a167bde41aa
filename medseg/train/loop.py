"""Training, from a plan to a model folder."""

from __future__ import annotations

import copy
import csv
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from medseg.errors import ModelError, OutputError
from medseg.io.files import written_whole
from medseg.model.networks import build_network, memory_format, placed
from medseg.model.plan import Plan
from medseg.model.segmenter import Model, pick_device
from medseg.model.weights import begin_with, find_model, save_weights
from medseg.report.metrics import Scores
from medseg.train.augment import change_intensities
from medseg.train.cache import prepare_cases
from medseg.train.card import write_card
from medseg.train.checkpoint import TrainState
from medseg.train.dataset import Case, Dataset, read_dataset
from medseg.train.evaluate import evaluate
from medseg.train.fingerprint import fingerprint
from medseg.train.loss import deep_dice_ce
from medseg.train.planner import make_plan
from medseg.train.sampler import Batch, Sampler
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
    Raises what `read_dataset`, `fingerprint` and `train_model` raise.
    """
    where = Path(folder)
    settings_file = where / "train.json"
    cases, plan = plan_dataset(dataset, where, start=start, progress=progress)
    settings = TrainSettings.load(settings_file) if settings_file.is_file() else TrainSettings()
    settings = settings.model_copy(update={"folds": folds})
    model = train_model(
        cases, plan, where, budget=budget, fold=fold, settings=settings, start=start, device=device, progress=progress
    )
    return validate_fold(model, cases, where, fold=fold, progress=progress)


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
    if plan.regions:
        raise ModelError("A plan whose outputs are overlapping regions can be used, but not trained. Leave them out.")
    where = Path(folder)
    training, _ = dataset.fold(fold, settings.folds)
    _claim_folder(where, plan, settings)
    weights, checkpoint = where / f"fold_{fold}.safetensors", where / f"fold_{fold}.checkpoint"
    if not weights.is_file():
        state = new_state(plan, settings, pick_device(device), start)
        recipe = _recipe(plan, settings, limit, training)
        if checkpoint.is_file():
            state.load(checkpoint, recipe)
        prepared = prepare_cases(training, plan, where / "cache", progress=_in_stage("prepare", progress))
        sampler = Sampler(prepared, plan, settings.seed, settings.foreground)
        _train(
            state, optimize(state, sampler, settings, limit), limit, lambda: state.save(checkpoint, recipe), progress
        )
        _write_history(state.history, where / f"fold_{fold}.history.csv")
        save_weights(state.average, weights)
        checkpoint.unlink(missing_ok=True)
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


def new_state(
    plan: Plan, settings: TrainSettings, device: torch.device, start: str | PathLike[str] | None = None
) -> TrainState:
    """Return a network with its running average and optimizer: random from the seed, or with the weights of a model.

    Raises ModelError where that model's network is another one.
    """
    torch.manual_seed(settings.seed)
    network = build_network(plan.network, len(plan.channels), plan.outputs)
    if start is not None:
        begin_with(network, start)
    network = placed(network, device).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True
    )
    return TrainState(network, copy.deepcopy(network), optimizer)


def optimize(state: TrainState, sampler: Sampler, settings: TrainSettings, budget: Budget) -> Iterator[float]:
    """Yield the loss of each step until the budget is spent; `state` is updated in place before each yield.

    Time between the steps counts, so that a time budget is one of wall clock while the training runs.
    Raises ModelError where the loss is no longer a number.
    """
    clock = time.monotonic()
    for batch in _batches(sampler, settings.batch, state):
        done = budget.spent(state.step, state.seconds)
        if done >= 1:
            return
        for group in state.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(done, settings.warmup)
        loss = _step(state, settings, batch)
        state.step += 1
        state.seconds += time.monotonic() - clock
        clock = time.monotonic()
        yield loss


def schedule(done: float, warmup: float) -> float:
    """Return the learning rate as a share of its highest when `done` of the budget is spent: rise, then cosine."""
    if done < warmup:
        return max(done, 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _train(
    state: TrainState, losses: Iterator[float], budget: Budget, save: Callable[[], None], progress: Progress | None
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
                save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        save()
        raise
    save()


def _step(state: TrainState, settings: TrainSettings, batch: Batch) -> float:
    device = next(state.network.parameters()).device
    random = torch.Generator().manual_seed(settings.seed * 1_000_003 + state.step)
    images = change_intensities(batch.images.to(device, memory_format=memory_format(device)), random)
    loss = deep_dice_ce(state.network(images), batch.target.to(device), batch.known.to(device))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ModelError(
            f"The training diverged: the loss is {value} at step {state.step}. Try a lower learning rate.",
            reason="diverged",
        )
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), settings.gradient_norm)
    state.optimizer.step()
    decay = min(settings.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        for mean, weight in zip(state.average.parameters(), state.network.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
    return value


def _batches(sampler: Sampler, size: int, state: TrainState) -> Iterator[Batch]:
    """Yield the batches from the state's step on; for a GPU, each is drawn while the one before is trained on."""
    if next(state.network.parameters()).device.type == "cpu":
        while True:  # a second thread would only take cores from the network
            yield sampler.batch(state.step, size)
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(sampler.batch, state.step, size)
        for step in itertools.count(state.step + 1):
            batch = drawn.result()
            drawn = pool.submit(sampler.batch, step, size)
            yield batch


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
