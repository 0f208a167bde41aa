"""Training, from a plan to a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from medseg.errors import ModelError, OutputError, UsageError
from medseg.io.files import reading
from medseg.model.plan import Plan
from medseg.model.segmenter import Model, pick_device
from medseg.model.weights import recipe_in
from medseg.report.metrics import Scores
from medseg.train.architectures import NetworkOptions
from medseg.train.begin import plan_from, warn_of_seen, weights_to_begin_with
from medseg.train.cache import needed_stems, prepare_cases
from medseg.train.capacity import find_capacity, kept_capacity
from medseg.train.card import write_card
from medseg.train.dataset import Case, Dataset, Fold, missing_files, read_dataset
from medseg.train.feed import resident
from medseg.train.file_hashes import FileHashes
from medseg.train.fingerprint import Fingerprint, fingerprint, names_digest
from medseg.train.loss import REGION_LOSSES, WITH_IGNORED
from medseg.train.optimize import new_state, optimize
from medseg.train.parallel import side_by_side
from medseg.train.planner import make_plan
from medseg.train.ranks import joined
from medseg.train.recipe import ENDED, differences
from medseg.train.run import FoldFiles, Progress, TrainProgress, run_steps
from medseg.train.sampler import Sampler
from medseg.train.settings import Budget, TrainSettings
from medseg.train.sweep import swept_and_kept
from medseg.train.validate import cross_validate, is_newer, is_scored, score_fold, validate_fold
from medseg.train.watch import PROBE_CASES, Probe, Watch


def train_dataset(  # noqa: PLR0913 - each is a decision of the user's
    dataset: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    budget: str = "30m",
    fold: Fold | Literal["all"] = 0,
    folds: int | None = None,
    start: str | PathLike[str] | None = None,
    device: str | None = None,
    tensorboard: bool = False,
    dropout: float | None = None,
    freeze_encoder: bool = False,
    progress: Progress | None = None,
    **options: Unpack[NetworkOptions],
) -> Scores:
    """Return the validation scores of fold `fold` of `folds` of a dataset folder, planned and trained into `folder`.

    With the fold "all" each of them is trained, one after the other, with the whole budget, and the scores are pooled
    as `cross_validate` does it. With "none" no case is kept aside: all of them train, and there are no scores.
    What an earlier run has done is not done again.
    A plan.json that is in the folder is followed, and a train.json too: edit them to decide otherwise. The number of
    folds is that of train.json, of folds that came with the dataset, or 5, unless it is given. With `start`, a model,
    its plan is followed with the labels of the dataset, and its weights are where the training begins; with
    `freeze_encoder` those of its encoder stay as they are. `options` and `dropout` are those of `plan_dataset`.
    Under torchrun several processes train it together; the first one writes, validates and returns the scores.
    Raises UsageError for another word, and what `read_dataset`, `fingerprint` and `train_model` raise.
    """
    where = Path(folder)
    if not isinstance(fold, int) and fold not in {"all", "none"}:
        raise UsageError(f'A fold is a number from 0, "all" or "none"; not {fold!r}.')
    Budget.parse(budget)  # a word that means nothing is found before hours of looking and preparing
    with joined() as ranks:
        progress = progress if ranks.is_first else None
        with ranks.first_alone():
            cases, plan = plan_dataset(
                dataset, where, start=start, device=device, dropout=dropout, progress=progress, **options
            )
            if freeze_encoder:
                _keep(where, frozen="encoder")
            settings = _settings_for(where, folds, cases, fold)
        train = partial(train_model, cases, plan, where, budget=budget, settings=settings, start=start, device=device)
        train = partial(train, tensorboard=tensorboard, progress=progress)
        if fold == "all":
            for one in range(settings.folds):
                model = train(fold=one)
                if ranks.size == 1 and not is_scored(cases, where, one):
                    score_fold(model, cases, where, one, progress)
            return cross_validate(cases, where, device=device, progress=progress) if ranks.is_first else Scores(())
        model = train(fold=fold)
        if fold == "none" and ranks.is_first:
            write_card(where, plan, cases.name, len(cases))
        if fold == "none" or not ranks.is_first:
            return Scores(())
        return validate_fold(model, cases, where, fold=fold, progress=progress)


def plan_dataset(
    dataset: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    start: str | PathLike[str] | None = None,
    device: str | None = None,
    dropout: float | None = None,
    progress: Progress | None = None,
    **options: Unpack[NetworkOptions],
) -> tuple[Dataset, Plan]:
    """Return a dataset and the plan of a model folder, which is made, with fingerprint.json, where it is not there.

    All cases are read and checked, unless fingerprint.json knows just these and none of their files is newer.
    The plan is made for a device, by default the fastest; what was found out about it is kept in capacity.json.
    With `start` it is the plan of that model with the labels of the dataset. `options` say which network is planned,
    and how large (`architectures.NetworkOptions`); `dropout` is written to train.json.
    Raises ModelError where the folder has a plan with another network, UsageError for options beside `start`, and what
    `read_dataset`, `fingerprint`, `make_plan` and `plan_from` raise.
    """
    where = Path(folder)
    if options and start is not None:
        raise UsageError("A training that begins with a model has the network of that model: omit the options of one.")
    checked = where / "fingerprint.json"
    cases = read_dataset(dataset, check_files=False)
    if not _is_checked(cases, Path(dataset), checked):
        facts = fingerprint(cases, progress=_in_stage("look", progress))
        _make_folder(where)
        facts.save(checked)
    if not (where / "plan.json").is_file():
        plan = (
            _planned(where, pick_device(device), options)
            if start is None
            else plan_from(start, cases, Fingerprint.load(checked))
        )
        # Measuring took seconds, in which a training of another fold may have made the plan that it now follows.
        if not (where / "plan.json").is_file():
            plan.save(where / "plan.json")
    if options and start is None:
        _check_network(where, options)
    if dropout is not None:
        _set_dropout(where, dropout)
    return cases, Plan.load(where / "plan.json")


def _check_network(where: Path, options: NetworkOptions) -> None:
    """Raise ModelError where a folder has a plan with another network than the one that is asked for."""
    plan = Plan.load(where / "plan.json")
    asked = make_plan(Fingerprint.load(where / "fingerprint.json"), kept_capacity(where), **options)
    if plan.network != asked.network:
        raise ModelError(
            "The folder holds a plan with another network than the one that is asked for. Plan into another folder, "
            "or omit the options of the network to follow this plan.",
            path=where / "plan.json",
            reason="network",
        )


def _set_dropout(where: Path, dropout: float) -> None:
    """Write a share of dropout to train.json. Raises UsageError for what is not a share."""
    if not 0 <= dropout < 1:
        raise UsageError(f"Dropout is a share from 0 to below 1 of the feature maps; not {dropout}.")
    _keep(where, dropout=dropout)


def _keep(where: Path, **changes: Any) -> None:
    """Write some numbers of the recipe to train.json; how many folds there are stays free where nobody stated it."""
    kept = kept_settings(where)
    kept.model_copy(update=changes).save(where / "train.json", without={"folds"} - kept.model_fields_set)


def _planned(where: Path, device: torch.device, options: NetworkOptions) -> Plan:
    """Return the plan for a fingerprint and a device; its capacity is found, unless capacity.json is of such a one."""
    facts, capacity = Fingerprint.load(where / "fingerprint.json"), kept_capacity(where)
    if capacity.device != device.type:
        capacity = find_capacity(facts, device, kept_settings(where), **options)
        capacity.save(where / "capacity.json")
    return make_plan(facts, capacity, **options)


def _settings_for(where: Path, folds: int | None, cases: Dataset, fold: Fold | str) -> TrainSettings:
    """Return the recipe of a folder with a number of folds.

    Without one it is that of folds that came with the dataset. A train.json that says nothing of it then states it,
    where there can be so many and no fold was trained yet.
    """
    settings = kept_settings(where)
    if folds is None and cases.splits and "folds" not in settings.model_fields_set:
        folds = cases.folds
    if folds is not None:
        if fold != "none":
            cases.fold(0, folds)
        stated = "folds" in settings.model_fields_set or any(where.glob("fold_*"))
        settings = settings.model_copy(update={"folds": folds})
        if not stated and (where / "train.json").is_file():
            settings.save(where / "train.json")
    return settings


def kept_settings(where: Path) -> TrainSettings:
    """Return the recipe of a model folder: that in train.json, or the default one."""
    file = where / "train.json"
    return TrainSettings.load(file) if file.is_file() else TrainSettings()


def _is_checked(cases: Dataset, root: Path, checked: Path) -> bool:
    if not checked.is_file() or any(missing_files(case) for case in cases):
        return False
    if Fingerprint.load(checked).names_sha256 != names_digest(cases):
        return False
    files = [file for case in cases for _, file in case.files]
    return is_newer(checked, sources=(root / "dataset.json", root / "cases.json", *files))


def train_model(  # noqa: PLR0913 - each is a decision of the user's
    dataset: Dataset,
    plan: Plan,
    folder: str | PathLike[str],
    *,
    budget: str = "30m",
    fold: Fold = 0,
    settings: TrainSettings | None = None,
    start: str | PathLike[str] | None = None,
    device: str | None = None,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Return a model trained on one fold of a dataset and write it to `folder`; go on where an earlier run stopped.

    `budget` is a time ("30m", "8h": of training itself, not of preparing or being switched off) or a number of steps
    ("500steps", "20epochs" of 250). The folder gets plan.json, train.json, fold_N.safetensors, fold_N.history.csv and
    fold_N.progress.png; a fold whose weights are there is not trained again. With the fold "none" all cases train. The
    first weights are random, or those of the model `start`, of the same fold where it has one. With `tensorboard` the
    history goes to tensorboard/fold_N, too.
    Raises ModelError where the folder holds another plan or weights that were trained otherwise, what is asked for
    cannot be trained, or the training diverges, what reading a case raises, and UsageError where TensorBoard is not
    installed.
    """
    settings = settings or TrainSettings(folds=dataset.folds)
    limit = Budget.parse(budget)
    check_possible(dataset, plan, settings, fold)
    where = Path(folder)
    training, validation = dataset.fold(fold, settings.folds)
    weights, cache = where / f"fold_{fold}.safetensors", where / "cache"
    with joined() as ranks:
        with ranks.first_alone():
            _claim_folder(where, plan, settings)
            begun = None if start is None else weights_to_begin_with(start, fold)
            if start is not None and ranks.is_first:
                warn_of_seen(start, dataset, fold, settings.folds)
            _check_frozen(settings, start)
            recipe = recipe_of(plan, _told_by(settings, fold), limit, training, cache, begun)
            _check_trained_so(weights, recipe)
        if not ranks.agreed(weights.is_file()):
            state = new_state(plan, settings, pick_device(device), begun)
            watch = Watch(where, fold, tensorboard=tensorboard) if ranks.is_first else None
            files = FoldFiles(where, fold, recipe, watch).resumed(state)
            needed = partial(needed_stems, dataset.cases, plan, cache)
            with swept_and_kept(cache, needed) if watch else nullcontext():
                with ranks.first_alone():
                    looked_at = validation[:: -(-len(validation) // PROBE_CASES) or 1] if watch else ()
                    shown = _in_stage("prepare", progress, fold)
                    prepared = prepare_cases((*training, *looked_at), plan, cache, progress=shown)
                if watch and looked_at:
                    watch.probe = Probe(prepared[len(training) :], plan, settings)
                on_device = next(state.network.parameters()).device
                drawn_from = resident(prepared[: len(training)], on_device)
                sampler = Sampler(drawn_from, plan, settings.seed, settings.foreground, on_device)
                losses = optimize(state, sampler, settings, limit, ranks)
                run_steps(state, losses, limit, files, progress, settings.early_stop)
                files.finish(state)
        ranks.wait()
    # The other folds of the folder have seen the cases that this one is validated on.
    return Model.load(where, device=device, folds=(fold,))


def _check_frozen(settings: TrainSettings, start: str | PathLike[str] | None) -> None:
    """Raise ModelError where an encoder is to stay as it is that has learned nothing."""
    if settings.frozen != "nothing" and start is None:
        raise ModelError(
            "An encoder that has learned nothing cannot stay as it is: begin with a model (--from), or set "
            '"frozen" to "nothing" in train.json.',
            reason="frozen",
        )


def _told_by(settings: TrainSettings, fold: Fold) -> TrainSettings:
    """Return what of a recipe matters: without a fold kept aside it is nothing how many there would be."""
    return settings.model_copy(update={"folds": 0}) if fold == "none" else settings


def check_possible(dataset: Dataset, plan: Plan, settings: TrainSettings, fold: Fold = 0) -> None:
    """Raise ModelError where a plan cannot be trained on a dataset in this way, with the reason."""
    if settings.early_stop and fold == "none":
        raise ModelError(
            "early_stop looks at validation cases, and no case is kept aside: set it to 0 in train.json, or train a "
            "fold.",
            reason="early_stop",
        )
    if plan.previous:
        raise ModelError("A plan with a previous stage can be used, but not trained.", reason="unsupported")
    if len(plan.channels) != len(dataset.channels):
        raise ModelError(
            f"The plan has {len(plan.channels)} channel(s), the dataset {len(dataset.channels)}. Make the plan anew.",
            reason="channels",
        )
    named = [[(label.value, label.name) for label in one.labels] for one in (plan, dataset)]
    if named[0] != named[1] or plan.regions != dataset.meaning.regions:
        raise ModelError(
            "The plan and the dataset have different labels or regions: an output would be taught what it does not "
            "mean. Make the plan anew, or give the dataset the labels of the plan.",
            reason="labels",
        )
    if plan.regions and settings.loss not in REGION_LOSSES:
        raise ModelError(
            f"The loss {settings.loss} compares classes of which one is true; regions overlap. Use one of "
            f"{', '.join(REGION_LOSSES)}.",
            reason="loss",
        )
    if dataset.meaning.ignore is not None and settings.loss not in WITH_IGNORED:
        raise ModelError(
            f"The loss {settings.loss} looks at whole patches and cannot leave voxels out. Use one of "
            f"{', '.join(WITH_IGNORED)}, or a dataset without an ignore label.",
            reason="loss",
        )


def _claim_folder(where: Path, plan: Plan, settings: TrainSettings) -> None:
    _make_folder(where)
    for name, content in (("plan.json", plan), ("train.json", settings)):
        file = where / name
        if not file.is_file():
            content.save(file)
            continue
        kept = type(content).load(file)
        if _compared(kept) != _compared(content):
            apart = differences(_compared(kept).model_dump_json(), _compared(content).model_dump_json())
            raise ModelError(
                f"The folder holds a model with another {name}: {apart}. "
                "Train into another folder, or delete this file.",
                path=file,
            )


def _check_trained_so(weights: Path, recipe: str) -> None:
    if weights.is_file() and (apart := differences(recipe_in(weights), recipe)):
        raise ModelError(
            f"This fold was trained before, otherwise: {apart}. {ENDED}",
            path=weights,
            reason="trained",
        )


def _compared(content: Plan | TrainSettings) -> Plan | TrainSettings:
    """Return what must stay the same: all but what a plan does behind its network."""
    return content.model_copy(update={"crf": None, "keep_largest": ()}) if isinstance(content, Plan) else content


def recipe_of(
    plan: Plan,
    settings: TrainSettings,
    budget: Budget,
    cases: Sequence[Case],
    cache: Path,
    begun: Path | None = None,
) -> str:
    """Return all that weights depend on as JSON, cases and the first weights, `begun`, as hashes of their files."""
    _make_folder(cache)
    hashes = FileHashes(cache / "files.json")
    content = side_by_side(partial(_content, hashes=hashes), cases)
    facts = [f"{case.name} {sorted(case.undrawn)} {case.ignore} {files}" for case, files in content]
    hashes.save()
    return json.dumps({
        "plan.json": _compared(plan).model_dump(mode="json"),
        "train.json": settings.model_dump(mode="json"),
        "budget": {name: value for name, value in budget.model_dump().items() if value is not None},
        "training cases": len(facts),
        "SHA-256 of the training cases": hashlib.sha256("\n".join(facts).encode()).hexdigest(),
        "SHA-256 of the first weights": None if begun is None else hashes.of(begun),
    })  # fmt: skip


def _content(case: Case, hashes: FileHashes) -> list[str]:
    found = []
    for _, file in case.files:
        with reading(file):
            found.append(hashes.of(file))
    return found


def _make_folder(where: Path) -> None:
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The model folder cannot be made: {error.strerror}.", path=where) from error


def _in_stage(stage: str, progress: Progress | None, fold: Fold | None = None) -> Callable[[int, int], None]:
    return lambda done, total: progress(TrainProgress(stage, done / total, fold=fold)) if progress else None
