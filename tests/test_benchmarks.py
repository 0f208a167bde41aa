"""The inference benchmark runs, on an image of seconds; its figures are for quiet machines and not looked at here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """Return a folder with a trunk at 3 mm where the real one would lie: soft blobs inside an ellipse in air."""
    size = (60, 50, 40)
    blobs = gaussian_filter(np.random.default_rng(5).standard_normal(size), 3)
    x, y = (np.linspace(-1, 1, n) for n in size[:2])
    inside = np.hypot(x[:, None], y)[:, :, None] < 0.9
    voxels = np.where(inside, 40 + 100 * blobs / blobs.std(), -1000).astype(np.int16)
    folder = tmp_path / "data" / "trunk_ct_mr"
    folder.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3.0, 3.0, 1.0])), folder / "example_ct.nii.gz")
    return folder.parent


def test_a_tiny_case_beside_monai(scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import inference

    results, work = tmp_path / "results", tmp_path / "work"
    arguments = ["--realdata", str(scan), "--case", "tiny", "--classes", "4", "--systems", "medseg-torch,monai,nnunet"]
    arguments += ["--results", str(results), "--work", str(work)]
    inference.main([*arguments, "--reference"])
    shown = capsys.readouterr().out
    assert "nnU-Net is left out" in shown
    found = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in results.glob("*.json")}
    assert set(found) == {f"tiny_4c_4f_s0_{name}.json" for name in ("medseg-torch", "monai", "reference")}
    runs = [found[f"tiny_4c_4f_s0_{name}.json"] for name in ("medseg-torch", "monai")]
    for run in runs:
        assert run["status"] == "done", shown
        assert run["peak_gb"] > 0.05
        assert 0 < run["labels"]["mixed_cells_share"] < 0.5
    labels = [nibabel.load(work / f"labels_tiny_4c_4f_s0_{name}" / "ct.nii.gz") for name in ("medseg-torch", "monai")]
    assert np.allclose(labels[0].affine, labels[1].affine)
    assert (np.asarray(labels[0].dataobj) == np.asarray(labels[1].dataobj)).mean() > 0.8  # they resample otherwise
    clear = found["tiny_4c_4f_s0_reference.json"]["margins"][-1]
    assert clear["voxels"] > 100_000
    assert clear["different"] == 0

    files = {file: file.stat().st_mtime_ns for file in results.iterdir()}
    inference.main(arguments)
    assert files == {file: file.stat().st_mtime_ns for file in results.iterdir()}
    inference.main(["--results", str(results), "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_phantom_is_the_same_for_a_seed_and_any_length(scan: Path, tmp_path: Path) -> None:
    from phantom_ct import write_ct

    voxels = []
    for name, slices, seed in (("a", 6, 1), ("b", 9, 1), ("c", 6, 2)):
        path = tmp_path / f"{name}.nii.gz"
        write_ct(scan, path, (64, 64, slices), (0.75, 0.75, 3.0), seed)
        voxels.append(np.asarray(nibabel.load(path).dataobj))
    assert np.array_equal(voxels[0], voxels[1][:, :, :6])
    assert not np.array_equal(voxels[0], voxels[2])


def test_memory_of_all_processes_is_measured_and_limited(tmp_path: Path) -> None:
    from measure import measure

    block = "import subprocess, sys, time; block = bytearray(b'x') * (200 * 2**20);"
    child, log = f"{block} time.sleep(1)", tmp_path / "log.txt"
    both = measure(
        [sys.executable, "-c", f"{block} subprocess.run([sys.executable, '-c', {child!r}])"],
        log,
        8,
        tmp_path,
        os.environ,
    )
    assert both.status == "done"
    assert 0.39 < both.peak_gb < 0.6
    over = measure([sys.executable, "-c", f"{block} time.sleep(60)"], log, 0.1, tmp_path, os.environ)
    assert over.status == "over 0.1 GB"
    assert over.seconds < 50
    assert (
        measure([sys.executable, "-c", "print('no'); raise SystemExit(3)"], log, 8, tmp_path, os.environ).status
        == "failed"
    )
    assert log.read_text(encoding="utf-8") == "no\n"


def test_a_scan_of_few_files_and_the_time_of_a_study(tmp_path: Path) -> None:
    import batch

    assert batch.scan(tmp_path, 200)["files"] == 200
    assert batch.each_s([10.0, 13.0, 16.0, 19.0]) == 3
    assert batch.each_s([10.0, 10.1, 13.0, 13.1, 16.0, 16.1], workers=2) == 1.5


def test_parts_of_the_recipe_together_and_apart_are_trained_once(tmp_path: Path, capsys) -> None:
    import recipes
    from datasets import make_balls

    make_balls(tmp_path / "data" / "hippocampus_mr", shape=(16, 18, 14))
    arguments = ["--realdata", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--seeds", "3"]
    arguments += ["--results", str(tmp_path / "results"), "--datasets", "hippocampus", "--budget", "3steps"]
    recipes.main([*arguments, "--parts", "muon+ema,growth"])
    shown = capsys.readouterr().out
    assert "difference per case to muon+ema: " in shown
    found = {file: json.loads(file.read_text()) for file in (tmp_path / "results").iterdir()}
    assert sorted(file.stem for file in found) == [
        f"hippocampus_f1_{parts}_3steps_s3" for parts in ("growth", "muon+ema")
    ]
    for file, content in found.items():
        model = json.loads((tmp_path / "work" / file.stem / "train.json").read_text())
        assert model.items() >= (content["train.json"] | {"seed": 3}).items()
        assert content["steps"] == 3
    times = [file.stat().st_mtime_ns for file in found]
    recipes.main([*arguments, "--parts", "muon+ema,growth"])
    assert [file.stat().st_mtime_ns for file in found] == times
    assert capsys.readouterr().out == shown


def test_choices_of_parts_of_the_recipe_begin_with_what_tells_most() -> None:
    import recipes
    from training import Run

    every = ["muon+ema", "muon+ema+growth", "muon", "ema", "muon+growth", "ema+growth", "growth", "none"]
    assert recipes.choices() == every
    assert recipes.changes_of("ema") == {"optimizer": "adamw", "learning_rate": 0.003, "ema": 0.99, "growth": 1}
    assert recipes.changes_of("none")["ema"] == 0
    asked = argparse.Namespace(parts=None, seeds="1,2", datasets="hippocampus,head_neck", fold=1, budget="10m")
    order = list(recipes.runs(asked))
    assert len(set(order)) == 32
    assert order[:5] == [
        *(Run("hippocampus", 1, parts, "10m", 1) for parts in every[:4]),
        Run("head_neck", 1, "muon+ema", "10m", 1),
    ]
    assert {run.seed for run in order[:16]} == {1}


def test_networks_are_ranked_and_shown_by_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import networks

    for name, dice, budget in (("a", 0.8, "8m"), ("b", 0.9, "8m"), ("c", 0.85, "8m"), ("a", 0.95, "20m")):
        scores = {"name": "organ", "dice": dice, "surface_dice": dice + 0.02}
        found = {
            "run": {"network": name, "budget": budget, "fold": 1, "seed": 0},
            "costs": {"parameters": 1_500_000, "gflop_patch": 5.25, "step_gb": 0.5},
            "training": {"peak_gb": 1.25},
            "steps": 100,
            "training_patches_per_s": 2.0,
            "inference_patches_per_s": {"torch": 3.0},
            "scores": {"mean": scores, "labels": [scores]},
        }
        (tmp_path / f"{name}_{budget}_f1_s0.json").write_text(json.dumps(found), encoding="utf-8")
    assert networks.best(tmp_path, "8m", 1, 0, 2) == ["b", "c"]
    assert networks.best(tmp_path, "8m", 1, 7, 2) == []
    networks.main(["--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| `a` | 20m | 0.9500 (0.950) | 0.9700 (0.970) | 100 | 1.50 M | 5.2 |")
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| `b`", "| `c`", "| `a`"]
    with pytest.raises(SystemExit):
        networks.main(["--results", str(tmp_path), "--realdata", str(tmp_path)])
