"""What a card does: tests marked `gpu`, training beside nnU-Net, and Dice after seconds of training.

python gpu.py --realdata DIR --work DIR [--nnunet PYTHON] [--parts tests,steps,dice,large]

Each part has a time limit, and its result goes to results/gpu/CARD.json when it ends. It needs no network. Without
nnU-Net that peer is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy import ndimage
from training import FOLDERS, HERE, PEER, run_measured
from training_speed import as_nnunet

from medseg.model.plan import Plan
from medseg.networks.kinds import Network
from medseg.train.loop import plan_dataset
from medseg.train.settings import TrainSettings

WARM, STEPS, LARGE_STEPS = 100, 500, 150
"""Steps that are not looked at, and the last one of a run; multiples of those after which losses are read."""

DICE_BUDGETS = ("15s", "30s")


class Busy:
    """Looks at what share of the time a card runs any kernel, as its driver counts it."""

    def __enter__(self) -> Busy:
        """Begin to look."""
        self.seen: list[tuple[float, float, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no longer."""
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        while not self._end.wait(0.25):
            share, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
            self.seen.append((time.time(), float(share), float(memory)))

    def between(self, began: float, ended: float) -> dict[str, float]:
        """Return the mean share in percent between two times, and the most memory of all times in GB."""
        shares = [share for when, share, _ in self.seen if began + 0.5 < when < ended]
        return {
            "busy_percent": round(float(np.mean(shares)), 1) if shares else -1.0,
            "gpu_gb": max(memory for *_, memory in self.seen) / 1024,
        }


def tests(_: argparse.Namespace) -> dict[str, Any]:
    """Run the tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-n", "8", "-m", "gpu", "-p", "no:cacheprovider"]
    if re.search(r"pytest.benchmark", _packages()):
        command += ["-p", "no:benchmark"]  # it warns beside xdist, and warnings are errors
    done = subprocess.run(
        [*command, str(HERE.parent / "tests" / "test_gpu.py")],
        cwd=HERE.parent, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    return {"status": done.returncode, "end": [line for line in lines if "FAILED" in line or "passed" in line][-20:]}


def _packages() -> str:
    listed = subprocess.run([sys.executable, "-m", "pip", "list"], capture_output=True, text=True, check=False)
    return listed.stdout.lower()


def steps(chosen: argparse.Namespace) -> dict[str, Any]:
    """Take steps on the hippocampus: medseg's own plan, nnU-Net, and its network, patch and batch in medseg."""
    dataset, found = chosen.realdata / FOLDERS["hippocampus"], {}
    own = _folder(chosen, "own")
    TrainSettings().save(own / "train.json")
    found["own"] = medseg_steps(dataset, own, STEPS)
    if chosen.nnunet is None:
        return found | {"nnunet": "left out: no --nnunet"}
    peer = _folder(chosen, "nnunet")
    run_measured([str(chosen.nnunet), str(PEER), "prepare", str(dataset), str(peer), "own"], peer / "prepare.txt")
    plans = peer / "preprocessed" / "Dataset001_Peer" / "nnUNetPlans.json"
    found["nnunet"] = nnunet_steps(chosen, peer, plans)
    same = _folder(chosen, "same")
    as_nnunet(dataset, same, plans)
    found["same"] = medseg_steps(dataset, same, STEPS)
    found["voxels_per_s_ratio"] = found["same"]["voxels_per_s"] / found["nnunet"]["voxels_per_s"]
    return found


def nnunet_steps(chosen: argparse.Namespace, folder: Path, plans: Path) -> dict[str, Any]:
    """Train with nnU-Net for STEPS iterations."""
    with Busy() as busy:
        command = [str(chosen.nnunet), str(PEER), "train", str(folder), "0", str(STEPS)]
        measured = run_measured(command, folder / "train.txt")
    configuration = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    starts = [began for began, _ in json.loads((folder / "times.json").read_text(encoding="utf-8"))]
    # Between two epochs of 250 it validates: steps of the second half alone.
    return _rates(starts[-150:], configuration["batch_size"], configuration["patch_size"], busy) | asdict(measured)


def medseg_steps(dataset: Path, folder: Path, count: int) -> dict[str, Any]:
    """Train with medseg as the files in `folder` say."""
    out = folder / "times.json"
    command = [sys.executable, str(HERE / "timed_training.py"), str(dataset), str(folder), str(count), str(out)]
    with Busy() as busy:
        measured = run_measured(command, folder / "train.txt")
    ends = json.loads(out.read_text(encoding="utf-8"))["ends"]
    plan, settings = Plan.load(folder / "plan.json"), TrainSettings.load(folder / "train.json")
    # A step is launched long before it ends: only where losses are read are times those of the card.
    return _rates(ends[count // 5 - 1 :: 25], settings.batch, plan.patch, busy, every=25) | asdict(measured)


def _rates(times: list[float], batch: int, patch: list[int] | tuple[int, ...], busy: Busy, every: int = 1) -> dict:
    step_s = (times[-1] - times[0]) / ((len(times) - 1) * every)
    size = {"batch": batch, "patch": list(patch), "step_s": step_s}
    return size | {"voxels_per_s": batch * float(np.prod(patch)) / step_s} | busy.between(times[0], times[-1])


def large(chosen: argparse.Namespace) -> dict[str, Any]:
    """Take steps on patches of 128 cubed of made cases of 250 cubed, with the widths of nnU-Net."""
    folder = _folder(chosen, "large")
    dataset = made_cases(folder / "data")
    TrainSettings(folds=3, optimizer="sgd", schedule="poly").save(folder / "train.json")
    _, plan = plan_dataset(dataset, folder, device="cuda")
    strides = ((1, 1, 1), *((2, 2, 2),) * 5)
    network = Network(
        features=(32, 64, 128, 256, 320, 320), kernels=((3, 3, 3),) * 6, strides=strides,
        blocks=(2,) * 6, decoder_blocks=(2,) * 5, heads=4,
    )  # fmt: skip
    Plan.model_validate(plan.model_dump() | {"patch": (128,) * 3, "network": network.model_dump()}).save(
        folder / "plan.json"
    )
    return medseg_steps(dataset, folder, LARGE_STEPS)


def made_cases(folder: Path, count: int = 3, edge: int = 250) -> Path:
    """Write smooth noise with blobs of fifteen classes, and return the folder."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    random = np.random.default_rng(0)
    for case in range(count):
        coarse = random.standard_normal((edge // 10,) * 3)
        classes = np.clip(np.digitize(coarse, np.linspace(-2, 2, 15)), 0, 15)
        image = ndimage.zoom(coarse, 10, order=1) * 100 + random.normal(0, 10, (edge,) * 3)
        labels = classes.repeat(10, 0).repeat(10, 1).repeat(10, 2)
        for part, array in (("images", image.astype(np.int16)), ("labels", labels.astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / part / f"case_{case}.nii.gz")
    names = {"background": 0, **{f"organ {number}": number for number in range(1, 16)}}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": names}))
    return folder


def dice(chosen: argparse.Namespace) -> dict[str, Any]:
    """Train fold 0 of the hippocampus for seconds, as a command from a cold start, and validate it."""
    found = {}
    for budget in DICE_BUDGETS:
        folder = _folder(chosen, f"dice_{budget}")
        command = [sys.executable, "-m", "medseg", "train", str(chosen.realdata / FOLDERS["hippocampus"]), str(folder)]
        measured = run_measured([*command, "--budget", budget], folder / "log.txt")
        rows = list(csv.DictReader((folder / "fold_0.history.csv").open(encoding="utf-8")))
        scores = json.loads((folder / "fold_0.scores.json").read_text(encoding="utf-8"))
        labels = {label["name"]: label["dice"] for label in scores["labels"]}
        found[budget] = {"steps": rows[-1]["step"], "mean_dice": scores["mean"]["dice"], "labels": labels}
        found[budget] |= {"cases": scores["labels"][0]["cases"]} | asdict(measured)
    return found


def _folder(chosen: argparse.Namespace, name: str) -> Path:
    folder: Path = chosen.work / name
    folder.mkdir(parents=True)
    return folder


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tests": tests, "steps": steps, "dice": dice, "large": large,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that were chosen, one after the other, and keep what each gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--nnunet", type=Path, help="the Python of nnU-Net's environment")
    parser.add_argument("--parts", default=",".join(PARTS))
    chosen = parser.parse_args(arguments)
    os.environ["PEER_DEVICE"] = "cuda"
    card = torch.cuda.get_device_name()
    chosen.results.mkdir(parents=True, exist_ok=True)
    file = chosen.results / f"{re.sub(r'[^A-Za-z0-9]+', '_', card)}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found |= {"card": card, "torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    for name in chosen.parts.split(","):
        began = time.perf_counter()
        try:
            found[name] = PARTS[name](chosen)
        except (SystemExit, subprocess.SubprocessError, OSError, KeyError) as error:
            found[name] = {"failed": str(error)}
        found[name]["part_s"] = round(time.perf_counter() - began, 1)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found[name])[:1500], flush=True)


if __name__ == "__main__":
    main()
