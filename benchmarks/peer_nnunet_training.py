"""nnU-Net v2 plans, trains and validates on a dataset folder, as its users do it.

Needs nnU-Net's own environment. PEER_DEVICE says where it computes: cpu, unless it is cuda, where the batch is its own.
`prepare DATASET WORK PATCH` converts, plans and prepares (on a CPU batch 2; PATCH such as 64,64,48, or `own`);
`train WORK FOLD ITERATIONS` trains, 250 iterations an epoch; `validate WORK FOLD OUT [mirror]` writes the labels of the
cases that the fold kept aside.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLANS, CONFIGURATION = "nnUNetPlans", "3d_fullres"
DEVICE = os.environ.get("PEER_DEVICE", "cpu")


def _locate(work: Path) -> None:
    for part in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{part}"] = str(work / part)
    os.environ |= {"nnUNet_compile": "f"}  # nnU-Net's own default on a CPU


def prepare(source: Path, work: Path, patch: str) -> None:
    """Write the dataset in nnU-Net's raw layout, its plan, and its prepared cases."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # noqa: PLC0415 - the peer's environment only
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    raw = work / "raw" / "Dataset001_Peer"
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    facts = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    for label in sorted((source / "labelsTr").glob("[!.]*.nii.gz")):
        name = label.name.removesuffix(".nii.gz")
        image = source / "imagesTr" / label.name
        shutil.copy(
            image if image.exists() else source / "imagesTr" / f"{name}_0000.nii.gz",
            raw / "imagesTr" / f"{name}_0000.nii.gz",
        )
        shutil.copy(label, raw / "labelsTr" / label.name)
    if "channel_names" not in facts:
        facts["channel_names"] = facts["modality"]
        facts["labels"] = {name: int(value) for value, name in facts["labels"].items()}
    content = {key: facts[key] for key in ("channel_names", "labels")}
    content |= {"numTraining": len(list((raw / "labelsTr").iterdir())), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    extract_fingerprints([1])
    plan_experiments([1])
    file = work / "preprocessed" / "Dataset001_Peer" / f"{PLANS}.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    configuration = plans["configurations"][CONFIGURATION]
    if DEVICE == "cpu":
        configuration["batch_size"] = 2
    if patch != "own":
        _set_patch(configuration, [int(edge) for edge in patch.split(",")])
    file.write_text(json.dumps(plans), encoding="utf-8")
    preprocess([1], PLANS, (CONFIGURATION,), (2,))


def _set_patch(configuration: dict[str, Any], patch: list[int]) -> None:
    """Set a smaller patch (in nnU-Net's order of axes), and the poolings that nnU-Net's rule gives it."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import (  # noqa: PLC0415
        get_pool_and_conv_props,
    )

    _, strides, kernels, patch, _ = get_pool_and_conv_props(configuration["spacing"], patch, 4, 999999)
    configuration["patch_size"] = [int(edge) for edge in patch]
    stages = len(strides)
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs |= {
        "n_stages": stages,
        "features_per_stage": [min(320, 32 * 2**stage) for stage in range(stages)],
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "strides": [list(stride) for stride in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }


def _trainer(fold: int) -> Any:
    import torch  # noqa: PLC0415
    from nnunetv2.run.run_training import get_trainer_from_args  # noqa: PLC0415

    return get_trainer_from_args("1", CONFIGURATION, fold, "nnUNetTrainer", PLANS, device=torch.device(DEVICE))


def train(work: Path, fold: int, iterations: int) -> None:
    """Train one fold, or go on after its last whole epoch; when each step began and ended goes to WORK/times.json."""
    import torch  # noqa: PLC0415 - the peer's environment only

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # all cores, as its command line does for a CPU
    trainer = _trainer(fold)
    trainer.num_epochs = max(1, round(iterations / 250))
    trainer.num_iterations_per_epoch = round(iterations / trainer.num_epochs)
    trainer.save_every = 1
    latest, file = Path(trainer.output_folder) / "checkpoint_latest.pth", work / "times.json"
    times: list[tuple[float, float]] = []
    if latest.exists():
        trainer.load_checkpoint(str(latest))
        times = json.loads(file.read_text(encoding="utf-8"))
    step, end = trainer.train_step, trainer.on_epoch_end

    def end_epoch() -> None:
        file.write_text(json.dumps(times), encoding="utf-8")
        end()

    trainer.train_step, trainer.on_epoch_end = lambda batch: _timed(step, batch, times), end_epoch
    trainer.run_training()


def _timed(step: Callable[[Any], Any], batch: Any, times: list[tuple[float, float]]) -> Any:
    began = time.time()
    result = step(batch)
    times.append((began, time.time()))
    return result


def validate(work: Path, fold: int, out: Path, *, mirror: bool) -> None:
    """Write the labels of the fold's validation cases."""
    import torch  # noqa: PLC0415
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: PLC0415

    splits = json.loads((work / "preprocessed/Dataset001_Peer/splits_final.json").read_text(encoding="utf-8"))
    images = work / "raw" / "Dataset001_Peer" / "imagesTr"
    predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device(DEVICE), allow_tqdm=False)
    folder = work / "results" / "Dataset001_Peer" / f"nnUNetTrainer__{PLANS}__{CONFIGURATION}"
    predictor.initialize_from_trained_model_folder(str(folder), (fold,), "checkpoint_final.pth")
    out.mkdir(parents=True, exist_ok=True)
    names = splits[fold]["val"]
    files = [[str(images / f"{name}_0000.nii.gz")] for name in names]
    predictor.predict_from_files(
        files, [str(out / name) for name in names], num_processes_preprocessing=1, num_processes_segmentation_export=1
    )


def main() -> None:
    """Run one of the three."""
    verb, work = sys.argv[1], Path(sys.argv[3] if sys.argv[1] == "prepare" else sys.argv[2])
    _locate(work)
    if verb == "prepare":
        prepare(Path(sys.argv[2]), work, sys.argv[4])
    elif verb == "train":
        train(work, int(sys.argv[3]), int(sys.argv[4]))
    else:
        validate(work, int(sys.argv[3]), Path(sys.argv[4]), mirror="mirror" in sys.argv)


if __name__ == "__main__":
    main()
