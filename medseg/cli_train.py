"""The verbs plan, networks, train and evaluate of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medseg.cli_options import (
    AsJson,
    Device,
    Dropout,
    FreezeEncoder,
    Network,
    NetworkDepth,
    NetworkSize,
    NetworkWidth,
    Start,
)
from medseg.cli_show import EXIT_FAILED, clock, print_json, print_table, progress, show_scores
from medseg.cli_terminal import err
from medseg.errors import ModelError, UsageError

if TYPE_CHECKING:
    from medseg.report.metrics import Scores
    from medseg.train.architectures import NetworkOptions
    from medseg.train.run import TrainProgress

UNSCORED = (
    "All cases trained and none was kept aside, so these weights have no scores. Cross-validation says what to expect: "
    "medseg train --fold all, with two cases or more."
)


def plan(  # noqa: PLR0913, PLR0917 - one option for each decision
    dataset: Annotated[Path, typer.Argument(help="A folder in medseg's, nnU-Net's raw or the decathlon's layout.")],
    model: Annotated[Path, typer.Argument(help="The model folder to make; a plan.json that is there is explained.")],
    start: Start = None,
    network: Network = None,
    width: NetworkWidth = None,
    depth: NetworkDepth = None,
    size: NetworkSize = None,
    dropout: Dropout = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Look at a dataset and decide how a model will be trained on it; print what was decided and why, and its costs."""
    from medseg.train.capacity import kept_capacity
    from medseg.train.costs import plan_costs
    from medseg.train.fingerprint import Fingerprint
    from medseg.train.loop import kept_settings, plan_dataset
    from medseg.train.planner import explain

    with progress(as_json=as_json) as show:
        _, made = plan_dataset(
            dataset,
            model,
            start=start,
            device=device,
            dropout=dropout,
            progress=lambda now: show(now.stage, now.done, ""),
            **_options(network, width, depth, size),
        )
        facts = Fingerprint.load(model / "fingerprint.json")
        costs = plan_costs(
            made,
            facts,
            settings=kept_settings(model),
            device=device,
            progress=lambda done, total: show("measure", done / total, ""),
        )
    rows = explain(facts, made, kept_capacity(model))
    if as_json:
        print_json({"decisions": rows, "costs": costs.to_dict()})
    else:
        print_table(str(model / "plan.json"), rows)
        print_table("What it costs", costs.rows())


def networks(as_json: AsJson = False) -> None:
    """List the networks that plan and train take by --network."""
    from medseg.train.architectures import NETWORKS

    rows = [{"network": name, "summary": one.summary, "adapts_to": one.adapts} for name, one in NETWORKS.items()]
    if as_json:
        print_json(rows)
    else:
        print_table("Networks", rows)


def train(  # noqa: PLR0913, PLR0917 - one option for each decision
    dataset: Annotated[Path, typer.Argument(help="A folder in medseg's, nnU-Net's raw or the decathlon's layout.")],
    model: Annotated[Path, typer.Argument(help="The model folder to make, or to go on with.")],
    budget: Annotated[str, typer.Option(help="Training time or steps: 30m, 8h, 20epochs, 500steps.")] = "30m",
    fold: Annotated[
        str,
        typer.Option(help="Which part of the cases is kept aside, from 0; all: one after the other; none: no case."),
    ] = "0",
    folds: Annotated[
        int | None, typer.Option(help="How many parts there are; by default as train.json says, or 5.")
    ] = None,
    start: Start = None,
    network: Network = None,
    width: NetworkWidth = None,
    depth: NetworkDepth = None,
    size: NetworkSize = None,
    dropout: Dropout = None,
    freeze_encoder: FreezeEncoder = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the history for TensorBoard, too.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a model; started again, it goes on where it was. A plan.json that is in the folder already is followed.

    With --fold all every fold is trained with the whole budget, and all cases are scored by the fold that has not seen
    them; the largest piece of a label is kept from then on where that was better.
    With --fold none all cases train, and nothing is scored.
    """
    from medseg.train.loop import train_dataset
    from medseg.train.ranks import starts_first

    turn = _fold_of(fold)
    with progress(as_json=as_json) as show, _told_of_interrupts():

        def report(now: TrainProgress) -> None:
            detail = ""
            if now.stage == "train":
                left = clock(now.seconds_left)
                detail = f"step {now.step}  loss {now.loss:.3f}  {now.steps_per_s:.2f} steps/s  {left} left"
            name = now.stage if turn != "all" or now.fold is None else f"fold {now.fold}: {now.stage}"
            show(name, now.done, detail)

        scores = train_dataset(
            dataset,
            model,
            budget=budget,
            fold=turn,
            folds=folds,
            start=start,
            device=device,
            tensorboard=tensorboard,
            dropout=dropout,
            freeze_encoder=freeze_encoder,
            progress=report,
            **_options(network, width, depth, size),
        )
    if starts_first():  # of several processes one has scores, and shows them
        if not as_json:
            _say_how_large(model / "cache")
        _show_trained(scores, model, turn, as_json=as_json)


def _options(network: str | None, width: int | None, depth: int | None, size: str | None) -> NetworkOptions:
    """Return what was said of the network. Raises UsageError for a size that is not a preset."""
    from medseg.train.architectures import SIZES, NetworkOptions

    options = NetworkOptions()
    if network is not None:
        options["network"] = network
    if width is not None:
        options["width"] = width
    if depth is not None:
        options["depth"] = depth
    if size is not None:
        if size not in SIZES:
            raise UsageError(f"The size of a network is {', '.join(SIZES)}; not {size!r}.")
        options["size"] = SIZES[size]
    return options


def _show_trained(scores: Scores, model: Path, turn: int | str, *, as_json: bool) -> None:
    if turn == "none":
        err.print(UNSCORED)
        if as_json:
            print_json(scores.to_dict())
        return
    show_scores(scores, f"{'All folds' if turn == 'all' else f'Fold {turn}'}, validation cases", as_json=as_json)
    if turn == "all" and not as_json:
        from medseg.io.text import read_json

        tried = read_json(model / "scores.json", "The file of scores", ModelError)["postprocessing"]
        rows = [row | {"largest_piece_of": ", ".join(row["largest_piece_of"])} for row in tried]
        print_table("Largest piece alone, tried on all folds", rows)
    show_failed(scores)


def _fold_of(text: str) -> int | Literal["all", "none"]:
    if text.isdecimal():
        return int(text)
    if text == "all":
        return "all"
    if text == "none":
        return "none"
    raise UsageError(f"A fold is a number from 0, all or none; not {text!r}.")


@contextmanager
def _told_of_interrupts() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err.print("Interrupted: the same command goes on where this one was.")
        raise


def _say_how_large(cache: Path) -> None:
    """Say what prepared cases take of the disk."""
    size = sum(file.stat().st_size for file in cache.glob("*")) if cache.is_dir() else 0
    err.print(
        f"{size / 1e6:.1f} MB of prepared cases are kept in the folder cache of the model for the next training. "
        "Delete that folder when no training needs it; cases are then prepared anew.",
    )


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A folder of label files, or a model folder.")],
    references: Annotated[Path, typer.Argument(help="A folder of label files of the same names, or a dataset folder.")],
    tolerance_mm: Annotated[float, typer.Option(help="How far surfaces may lie apart for the surface Dice.")] = 2.0,
    labels: Annotated[
        Path | None,
        typer.Option(help="What names labels: a model, a table or dataset.json; by default the references."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line for each case and label.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score label files against references, or a model on a dataset."""
    if (predictions / "plan.json").is_file():
        if labels is not None:
            raise UsageError("A model knows its labels: --labels is for a folder of label files.")
        scores = _scores_of_model(predictions, references, tolerance_mm, device, as_json=as_json)
    else:
        if device is not None:
            raise UsageError("Comparing label files needs no device: --device is for a model.")
        scores = _scores_of_files(predictions, references, tolerance_mm, labels)
    show_scores(scores, "Scores", as_json=as_json)  # first, since a file that cannot be written must not lose them
    if csv is not None:
        from medseg.report.metrics import write_scores_csv

        write_scores_csv(scores, csv)
    show_failed(scores)


def _scores_of_model(
    folder: Path, references: Path, tolerance_mm: float, device: str | None, *, as_json: bool
) -> Scores:
    from medseg.model.segmenter import Model
    from medseg.train.dataset import read_dataset
    from medseg.train.evaluate import evaluate as evaluate_model
    from medseg.train.evaluate import require_labels

    dataset = read_dataset(references)
    model = Model.load(folder, device=device)
    require_labels(model.plan, dataset)
    with progress(as_json=as_json) as show:
        return evaluate_model(
            model,
            dataset,
            tolerance_mm=tolerance_mm,
            progress=lambda done, total: show("evaluate", done / total, f"{done} of {total}"),
        )


def _scores_of_files(predictions: Path, references: Path, tolerance_mm: float, labels: Path | None) -> Scores:
    """Return scores of label files; what a dataset around the references says of labels and cases counts.

    Other names for labels change neither what is to be ignored, unless they name it, nor what was drawn.
    """
    from medseg.io.label_table import table_file
    from medseg.report.metrics import evaluate_folder
    from medseg.train.dataset import read_facts
    from medseg.train.dataset_json import Meaning, read_meaning
    from medseg.train.evaluate import drawn_alone

    root = next((one for one in (references, references.parent) if (one / "dataset.json").is_file()), None)
    if root is None and labels is None:
        return evaluate_folder(predictions, references, tolerance_mm=tolerance_mm)
    own = read_meaning(root / "dataset.json") if root else Meaning(())
    meaning = read_meaning(table_file(labels)) if labels else own
    left_out = None if own.ignore in meaning.values else own.ignore
    scores = evaluate_folder(
        predictions,
        references,
        meaning.labels,
        tolerance_mm=tolerance_mm,
        members=meaning.members,
        ignore=left_out if meaning.ignore is None else meaning.ignore,
    )
    return drawn_alone(scores, read_facts(root / "cases.json", own.labels)) if root else scores


def show_failed(scores: Scores) -> None:
    """Say which cases have no usable prediction; then the command has failed."""
    for case in scores.failed:
        err.print(f"medseg: {case.name}: no usable prediction ({case.failure})", style="red")
    if scores.failed:
        raise typer.Exit(EXIT_FAILED)
