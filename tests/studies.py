"""Studies and a pipeline small enough for a test of batches."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import yaml
from dicom_files import PATIENT, write_series
from models import tiny_model, tiny_plan

from medseg.model.plan import Channel
from medseg.model.weights import save_weights
from medseg.process.normalize import ZScore

ROOT = Path(__file__).parents[1]

SECRETS = (PATIENT, "DOE", "ID000", "ACC000", "1.2.3.")
"""What names and numbers of these studies look like."""


def write_study(folder: Path, number: int, **tags: object) -> None:
    """Write a study of one series, 12 x 10 x 8 voxels, called after a patient."""
    write_series(
        folder / f"DOE_JANE_{number}", range(8), shape=(10, 12), StudyInstanceUID=f"1.2.3.{number}",
        PatientID=f"ID{number:04d}", AccessionNumber=f"ACC{number:04d}", SeriesNumber=1, **tags,
    )  # fmt: skip


def write_pipeline(folder: Path, **changes: object) -> Path:
    """Write a pipeline with an untrained model beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(tiny_plan(channels=(Channel(name="CT", normalization=ZScore()),)))
    (folder / "model").mkdir(exist_ok=True)
    model.plan.save(folder / "model" / "plan.json")
    save_weights(model.networks[0], folder / "model" / "fold_0.safetensors")
    content = {
        "format": 1,
        "name": "tiny",
        "model": "model",
        "channels": [{"name": "CT", "modality": ["CT"]}],
        "outputs": ["nifti", "json", "csv"],
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def complete(out: Path, *, hashed: bool = False) -> dict[str, str]:
    """Return the status of each study in an output folder, after checking that nothing is partial or left over.

    Sizes of outputs are those of the manifest, and their hashes, too, if that is asked for.
    """
    statuses = {}
    for folder in out.iterdir() if out.exists() else ():
        if folder.name.startswith(".") or folder.name == "private" or folder.is_file():
            continue
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        there = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json"}
        assert there == {one["file"]: one["bytes"] for one in manifest["outputs"]}
        if manifest["status"] == "done":
            assert there.keys() == {"labels.labels.json", "labels.nii.gz", "measurements.json", "measurements.csv"}
        for one in manifest["outputs"] if hashed else ():
            assert hashlib.sha256((folder / one["file"]).read_bytes()).hexdigest() == one["sha256"]
        statuses[manifest["study"]] = manifest["status"]
    return statuses


class Watch:
    """Somebody who looks into the output folder of a batch all the time: studies are whole, and made once."""

    def __init__(self, out: Path, count: int, chance: random.Random):
        self.out, self.count, self.chance = out, count, chance
        self.hits = 0
        self._made: dict[str, bytes] = {}

    def look(self) -> int:
        """Return how many studies are done."""
        done = [study for study, status in complete(self.out).items() if status == "done"]
        for study in done:
            manifest = (self.out / study / "manifest.json").read_bytes()
            assert self._made.setdefault(study, manifest) == manifest, "what was done has been done again"
        return len(done)

    def forget(self) -> None:
        """Begin anew, with an empty folder."""
        self._made.clear()

    def wait_for_a_moment(self, process: subprocess.Popen) -> bool:
        """Wait until a batch starts, or has done some studies and works on another; return whether it still runs."""
        goal = self.chance.choice([None, *range(self.look(), self.count)])
        until = time.monotonic() + (self.chance.uniform(0, 4) if goal is None else 3000)
        while process.poll() is None and time.monotonic() < until:
            if self.look() >= (self.count if goal is None else goal) and any((self.out / ".work").glob("*")):
                break
            time.sleep(0.03)
        time.sleep(self.chance.uniform(0, 0.2))
        runs = process.poll() is None
        self.hits += runs
        return runs


def processes_with(variable: str) -> list[int]:
    """Return the processes that were started, by whomever, with an environment variable that is set so: NAME=VALUE."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended
    return found


def batch_command(pipeline: Path, studies: Path, out: Path, *options: str) -> list[str]:
    """Return the command that runs a batch, to be run in `environment()`."""
    start = [sys.executable, "-m", "medseg", "batch", str(pipeline), str(studies), str(out)]
    return [*start, "--runtime", "torch", "--threads", "1", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def assert_no_secret(out: Path, *texts: str) -> None:
    """Check that nothing but the private folder leads back to a patient, a path or a UID."""
    shown = [*texts]
    for path in out.rglob("*"):
        if path.is_file() and "private" not in path.parts:
            shown.append(path.read_bytes().decode("latin-1"))
        shown.append(str(path.relative_to(out)))
    assert not [secret for secret in SECRETS for text in shown if secret in text]
