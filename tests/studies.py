"""Studies and a pipeline small enough for a test of batches."""

from __future__ import annotations

import json
import os
import sys
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


def complete(out: Path) -> dict[str, str]:
    """Return the status of each study in an output folder, after checking that nothing is partial or left over."""
    statuses = {}
    for folder in out.iterdir():
        if folder.name in {"private", ".claims", ".work"} or folder.is_file():
            continue
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        there = {file.name for file in folder.iterdir()}
        assert there == {"manifest.json", *(one["file"] for one in manifest["outputs"])}
        if manifest["status"] == "done":
            assert there == {"manifest.json", "labels.nii.gz", "measurements.json", "measurements.csv"}
        statuses[manifest["study"]] = manifest["status"]
    return statuses


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
