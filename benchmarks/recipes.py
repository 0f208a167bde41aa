"""Parts of the recipe together and apart: the same fold, seed and minutes, once with each choice of them.

Each run leaves results/recipes/DATASET_fF_PARTS_BUDGET_sS.json; a run that has one is not run again. The first runs
tell most: what is on by default, and that with one part more or less, on all datasets; then the rest; then other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from training import FOLDERS, HERE, Bench, Run, compare, medseg_run, parser_of, show

from medseg.train.settings import TrainSettings

PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "muon": ({"optimizer": "muon", "learning_rate": 0.01}, {"optimizer": "adamw", "learning_rate": 0.003}),
    "ema": ({"ema": 0.99}, {"ema": 0.0}),
    "growth": ({"growth": 4}, {"growth": 1}),
}
"""What train.json says with a part, and without it."""

FIRST = ("muon+ema", "muon+ema+growth", "muon", "ema")
"""The recipe without growth, what it gains, and what each of the others is worth."""

BASE = FIRST[0]


def choices() -> list[str]:
    """Return all choices of parts, those that tell most first."""
    rest = [
        "+".join(part for part, there in zip(PARTS, chosen, strict=True) if there) or "none"
        for chosen in itertools.product((True, False), repeat=len(PARTS))
    ]
    return [*FIRST, *(choice for choice in rest if choice not in FIRST)]


def changes_of(choice: str) -> dict[str, Any]:
    """Return what train.json says with some parts, joined by "+", and without the others."""
    chosen = choice.split("+")
    found: dict[str, Any] = {}
    for part, (with_it, without) in PARTS.items():
        found |= with_it if part in chosen else without
    return found


def runs(chosen: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs that are asked for, in the order in which they tell most."""
    asked = chosen.parts.split(",") if chosen.parts else choices()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    for seed, first, dataset, parts in itertools.product(seeds, (True, False), chosen.datasets.split(","), asked):
        if (parts in FIRST) == first:
            yield Run(dataset, chosen.fold, parts, chosen.budget, seed)


def result(bench: Bench, run: Run) -> dict[str, Any]:
    """Return the result of a run, from its file or by running it."""
    file = bench.results / f"{run.name}.json"
    if not file.exists():
        found = medseg_run(bench, run, TrainSettings(seed=run.seed, **changes_of(run.system)))
        found["train.json"] = changes_of(run.system)
        file.write_text(json.dumps({"run": asdict(run)} | found, indent=1) + "\n", encoding="utf-8")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def main(arguments: list[str] | None = None) -> None:
    """Run what has no result yet, and show each beside the recipe without growth."""
    parser = parser_of(__doc__)
    parser.set_defaults(results=HERE / "results" / "recipes")
    parser.add_argument("--datasets", default=",".join(FOLDERS))
    parser.add_argument("--parts", help=f"choices such as {','.join(FIRST)}; without it all of them")
    parser.add_argument("--fold", type=int, default=1)
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seeds", default="1,2")
    chosen = parser.parse_args(arguments)
    bench = Bench(chosen.realdata, chosen.work, chosen.results, None)
    for folder in (chosen.work, chosen.results):
        folder.mkdir(parents=True, exist_ok=True)
    bases: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs(chosen):
        found = result(bench, run)
        show(f"{run.name}, {found['steps']} steps, {found['cpu_seconds']:.0f} s", found["cases"])
        if run.system == BASE:
            bases[run.dataset, run.seed] = found
        elif (run.dataset, run.seed) in bases:
            difference, low, high = compare(found["cases"], bases[run.dataset, run.seed]["cases"])
            print(f"difference per case to {BASE}: {difference:+.4f}, 95 % {low:+.4f} to {high:+.4f}")


if __name__ == "__main__":
    main()
