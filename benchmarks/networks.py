"""Every network that can be planned, trained for the same time on one fold of hippocampi, one core each.

Each run leaves results/networks/NETWORK_BUDGET_fFOLD_sSEED.json; a run that has one is not run again. Several of these
commands may run side by side with different networks: nothing is shared but the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training import FOLDERS, HERE, run_measured

from medseg.train.architectures import NETWORKS
from medseg.train.settings import TrainSettings

DATASET = "hippocampus"
TIMED_S = 5.0
"""How long patches are run through a trained network, at least."""


@dataclass(frozen=True)
class Run:
    """One training: by which network, for how long, on which fold, from which seed."""

    network: str
    budget: str
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its result."""
        return f"{self.network}_{self.budget}_f{self.fold}_s{self.seed}"


def result_of(run: Run, realdata: Path, work: Path, results: Path) -> dict[str, Any]:
    """Return the result of a run, from its file or by running it."""
    file = results / f"{run.name}.json"
    if not file.exists():
        found = {"run": asdict(run)} | measured_run(run, realdata / FOLDERS[DATASET], work / run.name)
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def measured_run(run: Run, dataset: Path, folder: Path) -> dict[str, Any]:
    """Plan, train, validate and time a network, each as a command from a cold start."""
    folder.mkdir(parents=True, exist_ok=True)
    TrainSettings(seed=run.seed).save(folder / "train.json")
    medseg, where = [sys.executable, "-m", "medseg"], [str(dataset), str(folder)]
    plan = [*medseg, "plan", *where, "--network", run.network, "--json"]
    run_measured(plan, folder / "plan.txt")
    told = (folder / "plan.txt").read_text(encoding="utf-8")
    costs = json.loads(told[told.index("{\n") :])["costs"]
    train = [*medseg, "train", *where, "--budget", run.budget, "--fold", str(run.fold)]
    trained = run_measured(train, folder / "train.txt")
    history = (folder / f"fold_{run.fold}.history.csv").read_text(encoding="utf-8").splitlines()
    heads, last = history[0].split(","), history[-1].split(",")
    done = dict(zip(heads, last, strict=True))
    timed = [sys.executable, str(HERE / "timed_patches.py"), str(folder), str(TIMED_S), str(folder / "patches.json")]
    run_measured(timed, folder / "patches.txt")
    scores = json.loads((folder / f"fold_{run.fold}.scores.json").read_text(encoding="utf-8"))
    return {
        "costs": costs,
        "training": asdict(trained),
        "steps": int(done["step"]),
        "training_patches_per_s": TrainSettings().batch * float(done["steps_per_s"]),
        "inference_patches_per_s": json.loads((folder / "patches.json").read_text(encoding="utf-8")),
        "scores": {part: scores[part] for part in ("mean", "labels")},
    }


def row_of(found: dict[str, Any]) -> dict[str, str]:
    """Return a line of the table: means over cases and labels, and of each label."""
    scores = found["scores"]
    shown = {
        score: f"{scores['mean'][score]:.4f} ({', '.join(f'{label[score]:.3f}' for label in scores['labels'])})"
        for score in ("dice", "surface_dice")
    }
    costs, run = found["costs"], found["run"]
    return {
        "network": f"`{run['network']}`",
        "budget": run["budget"],
        "Dice (each label)": shown["dice"],
        "surface Dice at 2 mm": shown["surface_dice"],
        "steps": f"{found['steps']}",
        "parameters": f"{costs['parameters'] / 1e6:.2f} M",
        "GFLOP a patch": f"{costs['gflop_patch']:.1f}",
        "patches/s in training": f"{found['training_patches_per_s']:.2f}",
        "in use, torch": f"{found['inference_patches_per_s']['torch']:.2f}",
        "in use, OpenVINO": _speed(found, "openvino"),
        "memory of a step": f"{costs['step_gb']:.2f} GB",
        "peak of the process": f"{found['training']['peak_gb']:.2f} GB",
    }


def _speed(found: dict[str, Any], runtime: str) -> str:
    speed = found["inference_patches_per_s"].get(runtime)
    return "" if speed is None else f"{speed:.2f}"


def mean_dice(found: dict[str, Any]) -> float:
    """Return by what networks are ranked."""
    return float(found["scores"]["mean"]["dice"])


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows as a table in Markdown."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept(results: Path, fold: int) -> list[dict[str, Any]]:
    """Return all results of a fold, by budget and then by Dice, the best first."""
    files = sorted(results.glob(f"*_f{fold}_s*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(found, key=lambda one: (one["run"]["budget"], -mean_dice(one)))


def best(results: Path, budget: str, fold: int, seed: int, count: int) -> list[str]:
    """Return the names of so many networks that had the best Dice with a budget, fold and seed."""
    of_budget = [one for one in kept(results, fold) if (one["run"]["budget"], one["run"]["seed"]) == (budget, seed)]
    return [one["run"]["network"] for one in of_budget[:count]]


def main(arguments: list[str] | None = None) -> None:
    """Run what has no result yet, then show all results that there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, help="without it nothing is run, and what is there is shown")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "networks")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, with commas between them")
    parser.add_argument("--budget", default="8m")
    parser.add_argument("--best", type=int, help="run so many networks alone, the best with the budget --of")
    parser.add_argument("--of", default="8m")
    parser.add_argument("--fold", type=int, default=1)
    parser.add_argument("--seed", type=int, default=12345)
    chosen = parser.parse_args(arguments)
    chosen.results.mkdir(parents=True, exist_ok=True)
    names = chosen.networks.split(",")
    if chosen.best:
        leading = best(chosen.results, chosen.of, chosen.fold, chosen.seed, chosen.best)
        names = [name for name in names if name in leading]
    if chosen.realdata and not chosen.work:
        parser.error("--work is needed to run something")
    for name in names if chosen.realdata else ():
        run = Run(name, chosen.budget, chosen.fold, chosen.seed)
        print(markdown([row_of(result_of(run, chosen.realdata, chosen.work, chosen.results))]), flush=True)
    if found := kept(chosen.results, chosen.fold):
        print(markdown([row_of(one) for one in found]))


if __name__ == "__main__":
    main()
