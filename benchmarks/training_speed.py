"""Training speed and memory beside nnU-Net: one network, patch, batch and list of augmentations, taking turns.

Also how long each takes from its command to its first step on a dataset that it has not seen, and the same for
medseg's own plan. The result is one file, results/training/speed_DATASET.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from training import FOLDERS, HERE, PATCHES, PEER, parser_of, run_measured

from medseg.model.plan import Plan
from medseg.networks.kinds import Network
from medseg.train.loop import plan_dataset
from medseg.train.settings import TrainSettings

WARM = 5
"""Steps at the beginning that are not looked at: both are slower there."""


def nnunet(python: Path, dataset: Path, folder: Path, patch: str, steps: int) -> dict[str, Any]:
    """Plan, prepare and train with nnU-Net: seconds of a step from start to start, and to the first."""
    began = time.time()
    run_measured([str(python), str(PEER), "prepare", str(dataset), str(folder), patch], folder / "prepare.txt")
    found = asdict(run_measured([str(python), str(PEER), "train", str(folder), "0", str(steps)], folder / "train.txt"))
    starts, ends = zip(*json.loads((folder / "times.json").read_text(encoding="utf-8")), strict=True)
    return found | {"first_step_s": ends[0] - began, "step_s": _step(starts)}


def medseg(dataset: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Plan, prepare and train with medseg as the files in `folder` say: the same numbers, and the share of drawing."""
    began, out = time.time(), folder / "times.json"
    command = [sys.executable, str(HERE / "timed_training.py"), str(dataset), str(folder), str(steps), str(out)]
    found = asdict(run_measured(command, folder / "train.txt"))
    times = json.loads(out.read_text(encoding="utf-8"))
    step = _step(times["ends"])
    return found | {
        "first_step_s": times["ends"][0] - began,
        "step_s": step,
        "drawing_share": times["drawing_s"] / step,
    }


def _step(times: list[float]) -> float:
    return median(after - before for before, after in zip(times[WARM:], times[WARM + 1 :], strict=False))


def as_nnunet(dataset: Path, folder: Path, plans: Path) -> None:
    """Write a plan and a recipe that train nnU-Net's network, on its patch, with its optimizer."""
    configuration = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    turned = {key: tuple(tuple(reversed(size)) for size in kwargs[key]) for key in ("kernel_sizes", "strides")}
    network = Network(
        features=kwargs["features_per_stage"],
        kernels=turned["kernel_sizes"],
        strides=turned["strides"],
        blocks=kwargs["n_conv_per_stage"],
        decoder_blocks=kwargs["n_conv_per_stage_decoder"],
        heads=kwargs["n_stages"] - 2,  # nnU-Net's lowest output weighs nothing
    )
    _, plan = plan_dataset(dataset, folder)
    patch = tuple(reversed(configuration["patch_size"]))
    plan = Plan.model_validate(plan.model_dump() | {"patch": patch, "network": network.model_dump()})
    plan.save(folder / "plan.json")
    batch = configuration["batch_size"]
    settings = TrainSettings(batch=batch, optimizer="sgd", schedule="poly", weight_decay=3e-5, foreground=1 / 3)
    settings.save(folder / "train.json")


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, show."""
    parser = parser_of(__doc__)
    parser.add_argument("--dataset", choices=FOLDERS, default="hippocampus")
    parser.add_argument("--nnunet", type=Path, required=True, help="the Python of nnU-Net's own environment")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=2)
    chosen = parser.parse_args(arguments)
    dataset, rows = chosen.realdata / FOLDERS[chosen.dataset], []
    for turn in range(chosen.turns):
        folders = {name: chosen.work / f"speed_{chosen.dataset}_{turn}_{name}" for name in ("nnunet", "same", "own")}
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        peer = nnunet(chosen.nnunet, dataset, folders["nnunet"], PATCHES[chosen.dataset], chosen.steps)
        TrainSettings().save(folders["own"] / "train.json")
        own = medseg(dataset, folders["own"], chosen.steps)
        plans = folders["nnunet"] / "preprocessed" / "Dataset001_Peer" / "nnUNetPlans.json"
        as_nnunet(dataset, folders["same"], plans)
        rows.append({"nnunet": peer, "same": medseg(dataset, folders["same"], chosen.steps), "own": own})
    chosen.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"steps": chosen.steps, "turns": rows}, indent=1) + "\n"
    (chosen.results / f"speed_{chosen.dataset}.json").write_text(text, encoding="utf-8")
    for row in rows:
        for name, found in row.items():
            print(name, "  ".join(f"{key} {value:.3g}" for key, value in found.items() if key != "status"))
        print(f"a step of the same network: {row['nnunet']['step_s'] / row['same']['step_s']:.2f} times as fast")


if __name__ == "__main__":
    main()
