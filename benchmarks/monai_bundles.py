"""Trained MONAI bundles imported and run beside MONAI's own bundle workflow, kind by kind.

Each kind (see `peer_monai_bundles.KINDS`) gives results/monai/KIND.json; kinds whose file is there are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from measure import measure
from nnunet_models import dice
from peer_monai_bundles import KINDS

from medseg.io import load
from medseg.model.importing import import_model
from medseg.model.segmenter import Model

HERE = Path(__file__).resolve().parent
PEER = HERE / "peer_monai_bundles.py"


@dataclass(frozen=True)
class Bench:
    """Where things are: real scans, working files, results, MONAI's interpreter; and how long models are trained."""

    realdata: Path
    work: Path
    python: Path
    steps: int

    def run(self, *arguments: object) -> None:
        """Run a command of MONAI's interpreter."""
        command = [str(self.python), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])


def workflow(bundle: Path, images: Path, out: Path) -> list[object]:
    """Return the arguments of MONAI's command that runs a bundle over a folder of images."""
    configs = bundle / "configs"
    return [
        "-m", "monai.bundle", "run", "--config_file", configs / "inference.json", "--meta_file",
        configs / "metadata.json", "--bundle_root", bundle, "--dataset_dir", images, "--output_dir", out,
    ]  # fmt: skip


def compare(bench: Bench, kind: str) -> dict[str, Any]:
    """Return how a kind's labels differ from those of MONAI's workflow, and the time and memory of both programs."""
    folder = bench.work / kind
    if not (folder / "bundle" / "models" / "model.pt").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        bench.run(PEER, "make", kind, bench.realdata, folder, bench.steps)
    for part in ("medseg", "monai"):
        shutil.rmtree(folder / part, ignore_errors=True)
    import_model(folder / "bundle", folder / "medseg")
    bench.run(*workflow(folder / "bundle", folder / "images", folder / "monai"))
    model = Model.load(folder / "medseg", device="cpu", runtime="torch")
    pairs, truths = [], []
    for file in sorted((folder / "images").iterdir()):
        theirs = _painted(next((folder / "monai").glob(f"{file.name.removesuffix('.nii.gz')}_*.nii.gz")))
        pairs.append((model.segment(load(file)).array[0], theirs))
        truth = np.asarray(nibabel.load(folder / "labels" / file.name).dataobj)
        truths.append((theirs, truth))
    return {
        "kind": kind,
        "steps": bench.steps,
        "scans": len(pairs),
        "dice": dice(pairs),
        "dice_of_the_worst_scan": min(dice([pair]) for pair in pairs),
        "dice_of_monai_with_the_truth": float(np.mean([dice([pair]) for pair in truths])),
        "voxels": sum(theirs.size for _, theirs in pairs),
        "foreground": sum(int((theirs > 0).sum()) for _, theirs in pairs),
        "different": sum(int((own != theirs).sum()) for own, theirs in pairs),
        "side_by_side": _side_by_side(bench, folder),
    }


def _painted(file: Path) -> np.ndarray:
    """Return a label map; of outputs that overlap later ones are painted over earlier ones."""
    found = np.asarray(nibabel.load(file).dataobj)
    found = found.reshape(*found.shape[:3], -1)
    if found.shape[3] == 1:
        return found[..., 0]
    labels = np.zeros(found.shape[:3])
    for place in range(found.shape[3]):
        labels[found[..., place] > 0] = place + 1
    return labels


def _side_by_side(bench: Bench, folder: Path) -> dict[str, Any]:
    """Return time and memory of both command lines over the first test image, two threads each."""
    single = folder / "single"
    shutil.rmtree(single, ignore_errors=True)
    (single / "in").mkdir(parents=True)
    scan = shutil.copy(sorted((folder / "images").iterdir())[0], single / "in")
    theirs = [str(bench.python), *map(str, workflow(folder / "bundle", single / "in", single / "monai"))]
    own = [sys.executable, "-m", "medseg", "segment", str(folder / "medseg"), str(scan), str(single / "own.nii.gz")]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "XDG_CACHE_HOME": str(single / "cache")}
    found = {}
    for system, command in (("monai", theirs), ("medseg_cold", own), ("medseg", own)):
        load_before = os.getloadavg()[0]
        measured = measure([*command, *(["--device", "cpu"] if command is own else [])], single / "log.txt", 8,
                           HERE.parent, environment)  # fmt: skip
        found[system] = vars(measured) | {"load_before": load_before}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Compare kinds that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--monai", type=Path, default=Path(sys.executable), help="a Python with pytorch-ignite")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "monai")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", type=int, default=400)
    chosen = parser.parse_args(arguments)
    bench = Bench(chosen.realdata, chosen.work, chosen.monai, chosen.steps)
    chosen.results.mkdir(parents=True, exist_ok=True)
    for kind in chosen.kinds.split(","):
        file = chosen.results / f"{kind}.json"
        if not file.exists():
            result = compare(bench, kind)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
