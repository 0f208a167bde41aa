"""Every loss on one task where organs are rare: one plan, fold, seed and number of steps for all.

The steps are those that the loss `dice_ce` takes in so many minutes of processor time on one core, so that other work
on the machine changes no result. Each loss leaves results/losses/DATASET_fF_medseg_LOSS_Nsteps_sS.json, and what a
step of each costs stands in results/losses/DATASET_cost.json. What has a result is not run again: the same command
goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

import torch
from training import HERE, Bench, Run, compare, medseg_run, parser_of, plan_of

from medseg.io import load
from medseg.model.plan import Plan
from medseg.report.metrics import compare_labels
from medseg.train.cache import prepare_cases
from medseg.train.dataset import read_dataset
from medseg.train.loss import LossName
from medseg.train.optimize import new_state, optimize
from medseg.train.sampler import Sampler
from medseg.train.settings import Budget, TrainSettings

CPU = torch.device("cpu")

SCORES = ("dice", "surface_dice", "hd95_mm")

WARM, STEPS = 2, 8
"""Steps of each loss that are not looked at, and that are: the first are slower."""

FIRST: LossName = "dice_ce"
"""The default: its steps fill the budget, and the others are set against it."""


def costs(bench: Bench, run: Run, minutes: float) -> dict[str, Any]:
    """Return the processor seconds of a step of each loss, taking turns, and how many steps of FIRST fill a budget."""
    plan = Plan.load(plan_of(bench, run))
    cases, _ = read_dataset(bench.data(run)).fold(run.fold, 5)
    prepared = prepare_cases(cases[:STEPS], plan, bench.work / f"{run.dataset}_cost")
    sampler = Sampler(prepared, plan, run.seed, TrainSettings().foreground, CPU)

    def training(loss: LossName) -> Iterator[list[float]]:
        settings = TrainSettings(seed=run.seed, loss=loss)
        return optimize(new_state(plan, settings, CPU), sampler, settings, Budget(steps=WARM + STEPS + 1))

    trainings = {loss: training(loss) for loss in get_args(LossName)}
    seconds: dict[str, list[float]] = {loss: [] for loss in trainings}
    for _ in range(WARM + STEPS):
        for loss, steps in trainings.items():
            began = time.process_time()
            next(steps)
            seconds[loss].append(time.process_time() - began)
    step_s = {loss: median(times[WARM:]) for loss, times in seconds.items()}
    return {"patch": plan.patch, "steps": round(60 * minutes / step_s[FIRST]), "step_s": step_s}


def kept(file: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what a file of JSON holds, after writing `content` to it."""
    if content is not None:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def result(bench: Bench, run: Run, loss: LossName) -> dict[str, Any]:
    """Return the result of a loss, from its file or by training with it."""
    file = bench.results / f"{run.name}.json"
    if file.exists():
        return kept(file)
    measured = medseg_run(bench, run, TrainSettings(seed=run.seed, loss=loss))
    predictions = bench.work / run.name / "validation" / f"fold_{run.fold}"
    scores = {key: value for key, value in scored(bench, run, predictions).items() if key != "dice"}
    return kept(file, {"run": asdict(run), "loss": loss} | measured | scores)


def scored(bench: Bench, run: Run, predictions: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return each score of each drawn organ of each case that the fold kept aside."""
    dataset = read_dataset(bench.data(run))
    found: dict[str, dict[str, dict[str, float]]] = {key: {} for key in SCORES}
    for case in dataset.fold(run.fold, 5)[1]:
        drawn = [label for label in dataset.labels if label.value not in case.undrawn]
        scores = compare_labels(load(predictions / f"{case.name}.nii.gz"), load(case.label), drawn)
        for key in SCORES:
            values = {score.name: getattr(score, key) for score in scores}
            found[key][case.name] = {name: value for name, value in values.items() if not math.isnan(value)}
    return found


def show(results: dict[LossName, dict[str, Any]], step_s: dict[str, float]) -> None:
    """Print a row for each loss: means over cases, of all labels and of each, and the difference to FIRST."""
    for loss, found in results.items():
        means = {key: _means(found["cases" if key == "dice" else key]) for key in SCORES}
        row = [loss, f"{step_s[loss]:.2f} s", f"{found['cpu_seconds']:.0f} s"]
        row += [f"{fmean(means[key].values()):.{places}f}" for key, places in zip(SCORES, (3, 3, 1), strict=True)]
        row += [f"{name} {value:.3f}" for name, value in means["dice"].items()]
        if FIRST in results and loss != FIRST:
            row.append("{:+.3f} ({:+.3f} to {:+.3f})".format(*compare(found["cases"], results[FIRST]["cases"])))
        print(f"| {' | '.join(row)} |")


def _means(cases: dict[str, dict[str, float]]) -> dict[str, float]:
    labels = sorted({label for case in cases.values() for label in case})
    return {label: fmean(case[label] for case in cases.values() if label in case) for label in labels}


def main(arguments: list[str] | None = None) -> None:
    """Measure what steps cost, train with what has no result yet, show all that has one."""
    parser = parser_of(__doc__)
    parser.set_defaults(dataset="head_neck", results=HERE / "results" / "losses")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--losses", default=",".join(get_args(LossName)), help="in the order in which they are run")
    parser.add_argument("--minutes", type=float, default=8.0, help="of processor time that the steps take with dice_ce")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(chosen.realdata, chosen.work, chosen.results, None)
    for folder in (bench.work, bench.results):
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(chosen.dataset, chosen.fold, "medseg", "", chosen.seed)
    file = bench.results / f"{chosen.dataset}_cost.json"
    cost = kept(file) if file.exists() else kept(file, costs(bench, run, chosen.minutes))
    budget = f"{cost['steps']}steps"
    runs = {loss: replace(run, system=f"medseg_{loss}", budget=budget) for loss in chosen.losses.split(",")}
    results = {}
    for loss, one in runs.items():
        results[loss] = result(bench, one, loss)
        show({loss: results[loss]}, cost["step_s"])
    show(results, cost["step_s"])


if __name__ == "__main__":
    main()
