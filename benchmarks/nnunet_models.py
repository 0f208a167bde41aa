"""nnU-Net's own models imported and run beside nnU-Net, kind by kind.

Each kind (see `peer_nnunet_models.KINDS`) gives results/nnunet/KIND.json; kinds whose file is there are left out. With
random weights near-ties are everywhere, and logits are compared; with trained ones labels, and where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from measure import measure
from peer_nnunet_models import CASCADE, KINDS, LOW

from medseg.io import load
from medseg.model.importing import import_model
from medseg.model.preprocess import nonzero_box, prepare, with_labels
from medseg.model.segmenter import Model

HERE = Path(__file__).resolve().parent
PEER = HERE / "peer_nnunet_models.py"


@dataclass(frozen=True)
class Own:
    """What medseg makes of a scan: the prepared image (C, I, J, K), logits on its grid, and labels on the scan's."""

    prepared: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Bench:
    """Where things are: real scans, working files, results, nnU-Net's interpreter; and how long models are trained."""

    realdata: Path
    work: Path
    results: Path
    python: Path
    epochs: int
    scans: int

    def run(self, *arguments: object) -> None:
        """Run the peer's script."""
        done = subprocess.run(
            [str(self.python), str(PEER), *map(str, arguments)],
            check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])

    def made(self, kind: str) -> Path:
        """Return the folder of a kind: nnU-Net's `model`, test `images` and `labels`, and the model imported."""
        folder = self.work / kind
        if not (folder / "model").is_dir():
            if KINDS[kind].base:
                self.made(KINDS[kind].base)
            shutil.rmtree(folder, ignore_errors=True)
            self.run("make", kind, self.realdata, self.work, self.epochs)
        for label in sorted((folder / "labels").iterdir())[self.scans :]:
            for file in (label, *(folder / "images").glob(f"{label.name.removesuffix('.nii.gz')}_*")):
                file.unlink()
        shutil.rmtree(folder / "medseg", ignore_errors=True)
        with warnings.catch_warnings(action="ignore"):
            configuration = CASCADE if KINDS[kind].cascade else None
            import_model(folder / "model", folder / "medseg", configuration=configuration)
        return folder


def compare(bench: Bench, kind: str) -> dict[str, Any]:
    """Return how a kind's logits and labels differ from nnU-Net's, and the time and memory of both programs."""
    folder = bench.made(kind)
    mirror = ["mirror"] if len(KINDS[kind].folds) > 1 else []
    result: dict[str, Any] = {"kind": kind, "epochs": bench.epochs}
    model = Model.load(folder / "medseg", device="cpu", runtime="torch")
    own: dict[str, Own] = {}
    for accumulate in ("float32", "float16"):
        out = folder / accumulate
        shutil.rmtree(out, ignore_errors=True)
        bench.run("predict", folder / "model", folder / "images", out, accumulate, *mirror)
        cases = []
        for file in sorted(out.glob("*.npz")):
            if file.stem not in own:
                own[file.stem] = _run_own(model, folder, file.stem, mirror=bool(mirror))
            cases.append(_compare_case(own[file.stem], folder, file))
        result[accumulate] = {key: max(case[key] for case in cases) for key in cases[0] if key.startswith("error")}
        result[accumulate] |= _labels(cases)
    if bench.epochs:
        result["side_by_side"] = _side_by_side(bench, folder, bool(mirror))
    return result


def _run_own(model: Model, folder: Path, name: str, *, mirror: bool) -> Own:
    channels = sorted((folder / "images").glob(f"{name}_*.nii.gz"))
    image = load(tuple(channels) if len(channels) > 1 else channels[0])
    part = image.cropped(*nonzero_box(image))
    prepared = prepare(part, model.plan)
    if model.previous:
        prepared = with_labels(prepared, model.previous.segment(part, mirror=mirror), part, model.plan)
    logits = model.logits(prepared, mirror=mirror).numpy()
    return Own(prepared.array, logits, model.segment(image, mirror=mirror).array[0])


def _compare_case(own: Own, folder: Path, file: Path) -> dict[str, Any]:
    peer, name, labels = np.load(file), file.stem, own.labels
    axes = [0, *(1 + list(peer["transpose"]).index(2 - axis) for axis in range(3))]
    data, logits = peer["data"].transpose(axes), peer["logits"].transpose(axes)
    difference = np.abs(own.logits - logits) / np.abs(logits).max()
    theirs = np.asarray(nibabel.load(file.with_name(f"{name}.nii.gz")).dataobj)
    truth = np.asarray(nibabel.load(folder / "labels" / f"{name}.nii.gz").dataobj)
    wrong = labels != theirs
    step = np.spacing(peer["largest"].astype(np.float16)).astype(np.float32)
    return {
        "error_prepared": float(np.abs(own.prepared - data).max() / np.abs(data).max()),
        "error_logits": float(difference.max()),
        "error_logits_99th_percentile": float(np.quantile(difference, 0.99)),
        "error_logits_median": float(np.median(difference)),
        "dice": dice([(labels, theirs)]),
        "dice_truth": dice([(theirs, truth)]),
        "pair": (labels, theirs),
        "voxels": wrong.size,
        "different": int(wrong.sum()),
        "margins": (peer["margin"] / step)[wrong].tolist(),
    }


def dice(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the mean Dice of the labels that either side has, each over all scans together."""
    values = {int(value) for pair in pairs for part in pair for value in np.unique(part)} - {0}
    scores = []
    for value in values:
        masks = [(a == value, b == value) for a, b in pairs]
        sizes = sum(int(a.sum()) + int(b.sum()) for a, b in masks)
        scores.append(2 * sum(int((a & b).sum()) for a, b in masks) / sizes)
    return float(np.mean(scores)) if scores else 1.0


def _labels(cases: list[dict[str, Any]]) -> dict[str, Any]:
    margins = np.concatenate([case["margins"] for case in cases])
    return {
        "scans": len(cases),
        "dice": dice([case["pair"] for case in cases]),
        "dice_of_the_worst_scan": min(case["dice"] for case in cases),
        "dice_of_nnunet_with_the_truth": float(np.mean([case["dice_truth"] for case in cases])),
        "voxels": sum(case["voxels"] for case in cases),
        "foreground": sum(int((case["pair"][1] > 0).sum()) for case in cases),
        "different": sum(case["different"] for case in cases),
        "largest_margin_of_nnunet_there_in_float16_steps": float(margins.max(initial=0)),
        "different_beyond_1_step": int((margins > 1).sum()),
        "different_beyond_4_steps": int((margins > 4).sum()),
    }


def _side_by_side(bench: Bench, folder: Path, mirror: bool) -> dict[str, Any]:
    """Return time and memory of both command lines over the first test image, two threads each."""
    single = folder / "single"
    shutil.rmtree(single, ignore_errors=True)
    (single / "in").mkdir(parents=True)
    first = sorted((folder / "images").iterdir())[0].name.removesuffix("_0000.nii.gz")
    files = sorted((folder / "images").glob(f"{first}_*.nii.gz"))
    for file in files:
        shutil.copy(file, single / "in")
    own = [sys.executable, "-m", "medseg", "segment", str(folder / "medseg"), ",".join(map(str, files))]
    own += [str(single / "own.nii.gz"), "--device", "cpu", *(["--mirror"] if mirror else [])]
    found = {}
    environment = os.environ | {"OMP_NUM_THREADS": "2", "XDG_CACHE_HOME": str(single / "cache")}
    commands = {
        "nnunet": _peer_commands(bench, folder / "model", single, mirror),
        "medseg_cold": [own],
        "medseg": [own],
    }
    for system, parts in commands.items():
        load = os.getloadavg()[0]
        measured = [measure(part, single / "log.txt", 8, HERE.parent, environment) for part in parts]
        found[system] = {
            "status": ", ".join(sorted({one.status for one in measured})),
            "seconds": sum(one.seconds for one in measured),
            "cpu_seconds": sum(one.cpu_seconds for one in measured),
            "peak_gb": max(one.peak_gb for one in measured),
            "load_before": load,
        }
    return found


def _peer_commands(bench: Bench, model: Path, single: Path, mirror: bool) -> list[list[str]]:
    """Return nnU-Net's commands for the image in `single`: one, or one for each stage of a cascade."""
    program = str(bench.python.with_name("nnUNetv2_predict_from_modelfolder"))
    stages = [next(model.glob(f"*__{name}")) for name in (LOW, CASCADE)] if not (model / "plans.json").exists() else []
    commands = []
    for stage in stages or [model]:
        folds = [file.name.removeprefix("fold_") for file in sorted(stage.glob("fold_*"))]
        command = [program, "-i", str(single / "in"), "-o", str(single / stage.name), "-m", str(stage), "-f", *folds]
        command += ["-device", "cpu", "-npp", "1", "-nps", "1", *([] if mirror else ["--disable_tta"])]
        if commands:
            command += ["-prev_stage_predictions", str(single / stages[0].name)]
        commands.append(command)
    return commands


def main(arguments: list[str] | None = None) -> None:
    """Compare kinds that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nnunet", type=Path, required=True, help="the Python of nnU-Net's own environment")
    parser.add_argument("--realdata", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "nnunet")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--epochs", type=int, default=0, help="of 50 steps each; 0 leaves weights random")
    parser.add_argument("--scans", type=int, default=8, help="not seen in training, at most")
    chosen = parser.parse_args(arguments)
    bench = Bench(chosen.realdata, chosen.work, chosen.results, chosen.nnunet, chosen.epochs, chosen.scans)
    chosen.results.mkdir(parents=True, exist_ok=True)
    for kind in chosen.kinds.split(","):
        file = chosen.results / f"{kind}_{'trained' if chosen.epochs else 'random'}.json"
        if not file.exists():
            result = compare(bench, kind)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
