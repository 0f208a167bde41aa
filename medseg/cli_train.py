"""The verbs plan, train and evaluate of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.cli_options import AsJson, Device, Start
from medseg.cli_show import EXIT_FAILED, clock, err, print_json, print_table, progress, show_scores

if TYPE_CHECKING:
    from medseg.report.metrics import Scores
    from medseg.train.dataset_json import Meaning
    from medseg.train.run import TrainProgress


def plan(
    dataset: Annotated[Path, typer.Argument(help="A folder in medseg's, nnU-Net's raw or the decathlon's layout.")],
    model: Annotated[Path, typer.Argument(help="The model folder to make; a plan.json that is there is explained.")],
    start: Start = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Look at a dataset and decide how a model will be trained on it; print what was decided and why."""
    from medseg.train.capacity import kept_capacity
    from medseg.train.fingerprint import Fingerprint
    from medseg.train.loop import plan_dataset
    from medseg.train.planner import explain

    with progress() as show:
        _, made = plan_dataset(
            dataset, model, start=start, device=device, progress=lambda now: show(now.stage, now.done, "")
        )
    rows = explain(Fingerprint.load(model / "fingerprint.json"), made, kept_capacity(model))
    if as_json:
        print_json(rows)
    else:
        print_table(str(model / "plan.json"), rows)


def train(  # noqa: PLR0913, PLR0917 - one option for each decision
    dataset: Annotated[Path, typer.Argument(help="A folder in medseg's, nnU-Net's raw or the decathlon's layout.")],
    model: Annotated[Path, typer.Argument(help="The model folder to make, or to go on with.")],
    budget: Annotated[str, typer.Option(help="Training time or steps: 30m, 8h, 20epochs, 500steps.")] = "30m",
    fold: Annotated[
        str,
        typer.Option(help="Which part of the cases is kept aside for validation, from 0; all: one after the other."),
    ] = "0",
    folds: Annotated[int, typer.Option(help="How many parts there are.", min=2)] = 5,
    start: Start = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the history for TensorBoard, too.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a model; started again, it goes on where it was. A plan.json that is in the folder already is followed.

    With --fold all every fold is trained with the whole budget, and all cases are scored by the fold that has not seen
    them; the largest piece of a label is kept from then on where that was better.
    """
    from medseg.errors import UsageError
    from medseg.train.loop import train_dataset

    if fold != "all" and not fold.isdigit():
        raise UsageError(f"A fold is a number from 0, or all; not {fold!r}.")
    with progress() as show:

        def report(now: TrainProgress) -> None:
            detail = ""
            if now.stage == "train":
                left = clock(now.seconds_left)
                detail = f"step {now.step}  loss {now.loss:.3f}  {now.steps_per_s:.2f} steps/s  {left} left"
            name = now.stage if fold != "all" or now.fold is None else f"fold {now.fold}: {now.stage}"
            show(name, now.done, detail)

        scores = train_dataset(
            dataset,
            model,
            budget=budget,
            fold=None if fold == "all" else int(fold),
            folds=folds,
            start=start,
            device=device,
            tensorboard=tensorboard,
            progress=report,
        )
    show_scores(scores, f"{'All folds' if fold == 'all' else f'Fold {fold}'}, validation cases", as_json=as_json)
    if fold == "all" and not as_json:
        tried = json.loads((model / "scores.json").read_text(encoding="utf-8"))["postprocessing"]
        rows = [row | {"largest_piece_of": ", ".join(row["largest_piece_of"])} for row in tried]
        print_table("Largest piece alone, tried on all folds", rows)
    show_failed(scores)


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A folder of label files, or a model folder.")],
    references: Annotated[Path, typer.Argument(help="A folder of label files of the same names, or a dataset folder.")],
    tolerance_mm: Annotated[float, typer.Option(help="How far surfaces may lie apart for the surface Dice.")] = 2.0,
    labels: Annotated[
        Path | None,
        typer.Option(help="JSON that names labels: a table, plan.json or dataset.json; by default the references'."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line for each case and label.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score label files against references, or a model on a dataset."""
    if (predictions / "plan.json").is_file():
        from medseg.model.segmenter import Model
        from medseg.train.dataset import read_dataset
        from medseg.train.evaluate import evaluate as evaluate_model

        with progress() as show:
            scores = evaluate_model(
                Model.load(predictions, device=device),
                read_dataset(references),
                tolerance_mm=tolerance_mm,
                progress=lambda done, total: show("evaluate", done / total, f"{done} of {total}"),
            )
    else:
        from medseg.report.metrics import evaluate_folder

        meaning = _meaning(labels, references)
        scores = evaluate_folder(
            predictions,
            references,
            meaning.labels if meaning else None,
            tolerance_mm=tolerance_mm,
            members=meaning.members if meaning else None,
            ignore=meaning.ignore if meaning else None,
        )
    if csv is not None:
        from medseg.report.metrics import write_scores_csv

        write_scores_csv(scores, csv)
    show_scores(scores, "Scores", as_json=as_json)
    show_failed(scores)


def show_failed(scores: Scores) -> None:
    """Say which cases have no usable prediction; then the command has failed."""
    for case in scores.failed:
        err.print(f"medseg: {case.name}: no usable prediction ({case.failure})", markup=False, style="red")
    if scores.failed:
        raise typer.Exit(EXIT_FAILED)


def _meaning(given: Path | None, references: Path) -> Meaning | None:
    """Return what the labels of references mean: as a file says, or the dataset.json in or above their folder."""
    from medseg.train.dataset_json import read_meaning

    beside = (folder / "dataset.json" for folder in (references, references.parent))
    file = given or next((one for one in beside if one.is_file()), None)
    return None if file is None else read_meaning(file)
