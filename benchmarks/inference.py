"""Whole-image inference beside peers: time and peak memory of medseg, nnU-Net v2 and MONAI, same image, same weights.

    python benchmarks/inference.py --realdata DIR --case small --classes 3,25 --systems medseg,nnunet,monai,network \
        --nnunet NNUNET_PYTHON

Each run is a command from a cold start, alone, and leaves one JSON file; what has a file is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import peer_nnunet
import torch
from measure import measure
from phantom_ct import write_ct
from random_model import write_model
from reference import compare, mixed_share
from safetensors.torch import load_file
from tables import print_tables, read_results, write_plot

import medseg
from medseg.model.plan import Plan
from medseg.model.weights import load_network

HERE = Path(__file__).resolve().parent
INPLANE_MM = 0.75

MEDSEG_ROWS = {
    "medseg-plain": ("--runtime", "torch", "--no-reuse"),
    "medseg-torch": ("--runtime", "torch"),
    "medseg-openvino": ("--runtime", "openvino"),
}
"""Rows of medseg by name, each with the options that it adds to `medseg segment`."""

NETWORKS = {"network-torch": "torch", "network-openvino": "openvino"}
NNUNET_WORKERS = {"nnunet": 1, "nnunet-sequential": 0}
SYSTEMS = (*NNUNET_WORKERS, "monai", *MEDSEG_ROWS, *NETWORKS)

KEPT_FACTS = ("runtime", "precision", "threads", "tiles_run", "tiles_reused", "stages")
"""What a result keeps of medseg's own report, which also names files."""


@dataclass(frozen=True)
class Case:
    """An image of edge x edge x slices voxels of 0.75 x 0.75 x slice_mm mm, and the edge of the model's patch."""

    name: str
    edge: int
    slices: int
    slice_mm: float
    patch: int = 96

    @classmethod
    def parse(cls, text: str) -> Case:
        """Return a case by its name, or one of 512 x 512 x SLICES voxels from "SLICESxMM"."""
        if text in NAMED:
            return NAMED[text]
        slices, slice_mm = text.split("x")
        return cls(text, 512, int(slices), float(slice_mm))


NAMED = {
    "tiny": Case("tiny", 96, 20, 3.0, patch=32),
    "small": Case("small", 512, 120, 3.0),
    "large": Case("large", 512, 600, 1.0),
}


@dataclass(frozen=True)
class Setting:
    """What a run is about: the image, the model, and the seed of both."""

    case: Case
    classes: int
    features: int
    seed: int

    def __str__(self) -> str:
        return f"{self.case.name}_{self.classes}c_{self.features}f_s{self.seed}"


@dataclass(frozen=True)
class Bench:
    """Where things are: real scans, results, working files; nnU-Net's interpreter; and the memory limit of a run."""

    realdata: Path
    results: Path
    work: Path
    nnunet: Path | None
    limit_gb: float

    def image(self, setting: Setting) -> Path:
        """Return the image, in a folder of its own under the name that nnU-Net wants; it is made if need be."""
        case = setting.case
        path = self.work / f"{case.name}_s{setting.seed}" / "ct_0000.nii.gz"
        if not path.exists():
            size, spacing = (case.edge, case.edge, case.slices), (INPLANE_MM, INPLANE_MM, case.slice_mm)
            write_ct(self.realdata, path, size, spacing, setting.seed)
        return path

    def model(self, setting: Setting) -> Path:
        """Return the medseg model folder, with the same model for nnU-Net in its `nnunet`; made if need be."""
        name = f"model_{setting.classes}c_{setting.features}f_p{setting.case.patch}_s{setting.seed}"
        folder = self.work / name
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=self.work) as beside:
                made = Path(beside, name)
                numbers = (setting.classes, setting.features, setting.case.patch)
                write_model(made, self.realdata, *numbers, seed=setting.seed)
                plan = json.loads((made / "plan.json").read_text(encoding="utf-8"))
                peer_nnunet.write_model(made / "nnunet", plan, load_file(made / "fold_0.safetensors"))
                if self.nnunet:
                    check_same_function(made, self.nnunet)
                made.rename(folder)
        return folder

    def command(self, system: str, setting: Setting) -> tuple[list[str], Path]:
        """Return the command that runs a system on a setting, and the label file that it writes."""
        image, model = self.image(setting), self.model(setting)
        out = self.work / f"labels_{setting}_{system}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        labels = out / "ct.nii.gz"
        if system in NNUNET_WORKERS:
            if self.nnunet is None:
                raise SystemExit("nnU-Net needs an environment of its own: give its interpreter with --nnunet.")
            workers = NNUNET_WORKERS[system]
            return peer_nnunet.command(self.nnunet, model / "nnunet", image.parent, out, workers), labels
        if system == "monai":
            return [sys.executable, str(HERE / "peer_monai.py"), str(model), str(image), str(labels)], labels
        if system in NETWORKS:
            return [sys.executable, str(HERE / "network_alone.py"), str(model), str(image), NETWORKS[system]], labels
        options = ["--device", "cpu", "--report", str(out / "report.json"), *MEDSEG_ROWS[system]]
        return [sys.executable, "-m", "medseg", "segment", str(model), str(image), str(labels), *options], labels


def check_same_function(model: Path, python: Path) -> None:
    """Raise SystemExit where nnU-Net's network gives other logits than medseg's: beyond 1e-4 of their largest."""
    plan = Plan.load(model / "plan.json")
    patch = np.random.default_rng(0).standard_normal((1, *plan.patch), dtype=np.float32)
    np.save(model / "patch.npy", patch)
    script = [str(python), str(HERE / "peer_nnunet.py"), str(model / "nnunet")]
    subprocess.run([*script, str(model / "patch.npy"), str(model / "logits.npy")], check=True, capture_output=True)
    with torch.inference_mode():
        own = load_network(plan, model / "fold_0.safetensors").eval()(torch.from_numpy(patch)[None])[0].numpy()
    error = float(np.abs(np.load(model / "logits.npy") - own).max() / np.abs(own).max())
    print(f"nnU-Net's network gives the same logits: largest difference {error:.1e} of the largest logit")
    if error >= 1e-4:
        raise SystemExit("The two networks are not one function.")


def run(bench: Bench, system: str, setting: Setting) -> dict[str, Any]:
    """Return the result of one run, as it is written to its file."""
    command, labels = bench.command(system, setting)
    log = labels.parent / "log.txt"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=bench.work) as cache:  # networks that were compiled before are no cold start
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        measured = measure(command, log, bench.limit_gb, HERE.parent, environment)
    result: dict[str, Any] = {"system": system, "setting": asdict(setting), "options": MEDSEG_ROWS.get(system, ())}
    result |= asdict(measured) | {"load_before": round(load, 1), "versions": _versions(bench), "machine": _machine()}
    if measured.status == "failed":
        print(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    elif measured.status == "done":
        result |= _outcome(system, labels, log)
    return result


def _outcome(system: str, labels: Path, log: Path) -> dict[str, Any]:
    """Return what a run has to say beyond what was measured from outside."""
    if system in NETWORKS:
        return dict(json.loads(log.read_text(encoding="utf-8").splitlines()[-1]))
    found: dict[str, Any] = {"labels": _describe(labels)}
    if system in MEDSEG_ROWS:
        report = json.loads((labels.parent / "report.json").read_text(encoding="utf-8"))[0]
        found["report"] = {fact: report[fact] for fact in KEPT_FACTS}
    return found


def _describe(labels: Path) -> dict[str, float]:
    """Return what kind of label map came out; cells as they are at about the model's 1.5 mm."""
    array = np.asarray(nibabel.load(labels).dataobj)[::2, ::2]
    return {
        "labels": len(np.unique(array)),
        "foreground_share": round(float((array > 0).mean()), 4),
        "mixed_cells_share": round(mixed_share(array), 4),
    }


def _versions(bench: Bench) -> dict[str, str]:
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    found = {"medseg": medseg.__version__, "commit": commit} | {name: version(name) for name in ("torch", "monai")}
    if bench.nnunet:
        code = "import importlib.metadata as m; print(m.version('nnunetv2'), m.version('torch'))"
        told = subprocess.run([str(bench.nnunet), "-c", code], capture_output=True, text=True, check=True)
        found["nnunet"], found["nnunet_torch"] = told.stdout.split()
    return found


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": name, "cores": os.cpu_count(), "memory_gb": round(memory)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no result yet, then show all results that are there."""
    options = _options(arguments)
    if options.plot:
        write_plot(read_results(options.results), options.plot)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the run under way ends as well
    bench = Bench(options.realdata, options.results, options.work, options.nnunet, options.limit_gb)
    settings = [Setting(*one) for one in product(options.case, options.classes, options.features, options.seeds)]
    systems = _present(options.systems, bench.nnunet)
    for setting, system in product(settings, systems):
        file = bench.results / f"{setting}_{system}.json"
        if options.again or not file.exists():
            result = run(bench, system, setting)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{setting} {system}: {result['status']}, {result['seconds']:.1f} s, {result['peak_gb']:.2f} GB")
    for setting in settings if options.reference else []:
        counts = compare(bench.model(setting), bench.image(setting))
        print(f"{setting} labels against the float64 reference: {json.dumps(counts)}")
        (bench.results / f"{setting}_reference.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    print_tables(read_results(bench.results))


def _systems(text: str) -> list[str]:
    """Return the systems of a list with commas, in which "medseg" and "network" stand for all their rows."""
    found = []
    for name in text.split(","):
        rows = [name] if name in SYSTEMS else [system for system in SYSTEMS if system.startswith(f"{name}-")]
        if not rows:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(SYSTEMS)}")
        found += rows
    return found


def _present(systems: Sequence[str], nnunet: Path | None) -> list[str]:
    """Return the systems that can run here; say which cannot, and why."""
    present = list(systems)
    if nnunet is None and set(present) & set(NNUNET_WORKERS):
        print("nnU-Net is left out: it needs an environment of its own, whose interpreter --nnunet names")
        present = [system for system in present if system not in NNUNET_WORKERS]
    if not find_spec("openvino") and any("openvino" in system for system in present):
        print("OpenVINO is left out: it is not installed")
        present = [system for system in present if "openvino" not in system]
    return present


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [one(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--realdata", type=Path, help="folder of the real scans; the image is made from one")
    parser.add_argument("--case", type=several(Case.parse), default="small", help="tiny, small, large or SLICESxMM")
    parser.add_argument("--classes", type=several(int), default="25", help="outputs of the network, with background")
    parser.add_argument("--features", type=several(int), default="4", help="of the finest level: 4 or 32")
    parser.add_argument("--seeds", type=several(int), default="0", help="of image and weights; one run for each")
    parser.add_argument("--systems", type=_systems, default="nnunet,monai,medseg,network", help=", ".join(SYSTEMS))
    parser.add_argument("--nnunet", type=Path, metavar="PYTHON", help="interpreter of nnU-Net's environment")
    parser.add_argument("--limit-gb", type=float, default=20, help="a run with more memory is ended")
    parser.add_argument("--again", action="store_true", help="also run what has a result")
    parser.add_argument("--reference", action="store_true", help="compare medseg's labels with a float64 reference")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="only draw the results that are there")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "medseg-benchmarks"))
    options = parser.parse_args(arguments)
    if not options.plot and not options.realdata:
        parser.error("--realdata is needed to make the image")
    return options


if __name__ == "__main__":
    main()
