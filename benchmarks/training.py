"""Training beside nnU-Net: accuracy on the cases that a fold kept aside, for equal time on one machine.

Each run leaves results/training/DATASET_fF_SYSTEM_BUDGET_sS.json; a run that has one is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from measure import Measurement, measure

from medseg.io import load
from medseg.report.metrics import compare_labels
from medseg.train.dataset import Case, read_dataset
from medseg.train.settings import TrainSettings

HERE = Path(__file__).resolve().parent
PEER = HERE / "peer_nnunet_training.py"
FOLDERS = {"hippocampus": "hippocampus_mr", "head_neck": "head_neck_ct"}
PATCHES = {"hippocampus": "own", "head_neck": "64,64,48"}
"""nnU-Net's own patch, or the largest that lets it take some hundred steps in half an hour on two cores."""

ABSENT = "medseg_absent"
"""medseg that takes organs that were not drawn for absent ones, as tools do that know of no others."""

SCORED: dict[str, list[str]] = {"cases": [], "cases_mirrored": ["mirror"]}
"""How nnU-Net segments the cases kept aside."""

INTERVAL_S, LIMIT_GB = 1.0, 20
RESAMPLES = 10_000


@dataclass(frozen=True)
class Run:
    """One training: which data, fold and seed, by what, and for how long."""

    dataset: str
    fold: int
    system: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its result."""
        return f"{self.dataset}_f{self.fold}_{self.system}_{self.budget}_s{self.seed}"


@dataclass(frozen=True)
class Bench:
    """Where things are: real scans, working files, results, nnU-Net's interpreter."""

    realdata: Path
    work: Path
    results: Path
    python: Path | None

    def data(self, run: Run) -> Path:
        """Return the dataset folder of a run."""
        return self.realdata / FOLDERS[run.dataset]

    def result(self, run: Run) -> dict[str, Any]:
        """Return the result of a run, from its file or by running it."""
        file = self.results / f"{run.name}.json"
        if not file.exists():
            found = nnunet_run(self, run) if run.system == "nnunet" else medseg_run(self, run)
            file.write_text(json.dumps({"run": asdict(run)} | found, indent=1) + "\n", encoding="utf-8")
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content


def medseg_run(bench: Bench, run: Run, settings: TrainSettings | None = None) -> dict[str, Any]:
    """Train, as a command from a cold start; the model validates itself.

    `settings` are the recipe, by default the usual one with the seed of the run. The system ABSENT is medseg that is
    not told which organs were not drawn; what is scored is the same.
    """
    folder, dataset = bench.work / run.name, bench.data(run)
    if run.system == ABSENT:
        dataset = _without_cases_json(dataset, bench.work / f"{dataset.name}_{ABSENT}")
    if not (folder / "train.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(plan_of(bench, run), folder)
        (settings or TrainSettings(seed=run.seed)).save(folder / "train.json")
    command = [sys.executable, "-m", "medseg", "train", str(dataset), str(folder)]
    measured = run_measured([*command, "--budget", run.budget, "--fold", str(run.fold)], folder / "log.txt")
    _, validation = read_dataset(bench.data(run)).fold(run.fold, 5)
    cases = _scored(validation, folder / "validation" / f"fold_{run.fold}", bench.data(run))
    history = (folder / f"fold_{run.fold}.history.csv").read_text(encoding="utf-8").splitlines()
    last = dict(zip(history[0].split(","), history[-1].split(","), strict=True))
    return asdict(measured) | {
        "steps": int(last["step"]),
        "steps_per_s": float(last["steps_per_s"]),
        "cases": cases,
    }


def plan_of(bench: Bench, run: Run) -> Path:
    """Return the plan of a dataset, made once: one that is made on fewer cores has smaller patches and more steps."""
    folder = bench.work / f"{run.dataset}_plan"
    if not (folder / "plan.json").exists():
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "medseg", "plan", str(bench.data(run)), str(folder)]
        run_measured(command, folder / "log.txt")
    return folder / "plan.json"


def _without_cases_json(dataset: Path, copy: Path) -> Path:
    copy.mkdir(parents=True, exist_ok=True)
    for part in dataset.iterdir():
        if part.name != "cases.json" and not (copy / part.name).exists():
            (copy / part.name).symlink_to(part.resolve())
    return copy


def nnunet_run(bench: Bench, run: Run) -> dict[str, Any]:
    """Train for so many iterations.

    Its seconds are those of the training command, with start and online validation (of the last one, where it was
    interrupted); its training_s those of all steps alone.
    """
    folder = bench.work / run.name
    prepared = folder / "prepared"
    peer = [str(bench.python), str(PEER)]
    if not prepared.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [*peer, "prepare", str(bench.data(run)), str(folder), PATCHES[run.dataset]]
        prepared.write_text(json.dumps(asdict(run_measured(command, folder / "prepare.txt"))), encoding="utf-8")
    iterations = run.budget.removesuffix("iterations")
    measured = run_measured([*peer, "train", str(folder), str(run.fold), iterations], folder / "train.txt")
    times = np.asarray(json.loads((folder / "times.json").read_text(encoding="utf-8")))
    found = asdict(measured) | {
        "training_s": float(np.diff(times).sum()),
        "prepare": json.loads(prepared.read_text(encoding="utf-8")),
        "steps_per_s": float(1 / np.median(times[:, 1] - times[:, 0])),
    }
    _, validation = read_dataset(bench.data(run)).fold(run.fold, 5)
    for key, options in SCORED.items():
        out = folder / key
        run_measured([*peer, "validate", str(folder), str(run.fold), str(out), *options], folder / f"{key}.txt")
        found[key] = _scored(validation, out, bench.data(run))
    return found


def run_measured(command: list[str], log: Path) -> Measurement:
    """Return the measurement of a command; leave with its log's name where it fails."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    measured = measure(command, log, LIMIT_GB, HERE, environment, INTERVAL_S)
    if measured.status != "done":
        raise SystemExit(f"{measured.status}: see {log}")
    return measured


def _scored(cases: Iterable[Case], predictions: Path, dataset: Path) -> dict[str, dict[str, float]]:
    labels = read_dataset(dataset).labels
    found = {}
    for case in cases:
        drawn = [label for label in labels if label.value not in case.undrawn]
        scores = compare_labels(load(predictions / f"{case.name}.nii.gz"), load(case.label), drawn)
        found[case.name] = {score.name: score.dice for score in scores if score.dice == score.dice}
    return found


def show(name: str, cases: dict[str, dict[str, float]]) -> None:
    """Print mean and median Dice of each label, and their mean."""
    labels = sorted({label for case in cases.values() for label in case})
    rows = {label: [case[label] for case in cases.values() if label in case] for label in labels}
    text = "  ".join(f"{label} {fmean(row):.3f} ({median(row):.3f}, n {len(row)})" for label, row in rows.items())
    print(f"{name}: mean {fmean(map(fmean, rows.values())):.4f}; mean (median) {text}")


def compare(ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> tuple[float, float, float]:
    """Return the mean paired difference of Dice over cases, and the ends of its 95 % bootstrap interval."""
    pairs = np.asarray([fmean(case.values()) - fmean(theirs[name].values()) for name, case in ours.items()])
    drawn = np.random.default_rng(12345).choice(pairs, (RESAMPLES, len(pairs))).mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(pairs.mean()), float(low), float(high)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of training asks for: where things are."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--realdata", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "training")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run what has no result yet, then show all."""
    parser = parser_of(__doc__)
    parser.add_argument("--dataset", choices=FOLDERS, default="hippocampus")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--budgets", default="20m", help="of medseg: 20m,60m; `equal` is the time that nnU-Net took")
    parser.add_argument("--seeds", default="12345")
    parser.add_argument("--system", choices=("medseg", ABSENT), default="medseg")
    parser.add_argument(
        "--nnunet", type=Path, help="the Python of nnU-Net's own environment; without it that peer is left out"
    )
    parser.add_argument("--iterations", type=int, default=1250, help="of nnU-Net")
    chosen = parser.parse_args(arguments)
    bench = Bench(chosen.realdata, chosen.work, chosen.results, chosen.nnunet)
    chosen.results.mkdir(parents=True, exist_ok=True)
    peer, equal = None, "equal"
    if chosen.nnunet:
        run = Run(chosen.dataset, chosen.fold, "nnunet", f"{chosen.iterations}iterations", 0)
        peer = bench.result(run)
        equal = f"{max(peer['seconds'], peer['training_s']):.0f}s"  # the first is too short where it was interrupted
        for key in SCORED:
            show(f"{run.name} {key}", peer[key])
    for budget in filter(None, chosen.budgets.replace("equal", equal).split(",")):
        for seed in map(int, chosen.seeds.split(",")):
            run = Run(chosen.dataset, chosen.fold, chosen.system, budget, seed)
            found = bench.result(run)
            show(run.name, found["cases"])
            for key in SCORED if peer else ():
                difference, low, high = compare(found["cases"], peer[key])
                print(f"difference per case to nnU-Net's {key}: {difference:+.4f}, 95 % {low:+.4f} to {high:+.4f}")


if __name__ == "__main__":
    main()
