"""nnU-Net v2 models of many kinds, planned, trained and run by nnU-Net itself on real images.

Needs nnU-Net's own environment. `make KIND REALDATA WORK EPOCHS` writes WORK/KIND/model (with 0 epochs its weights are
random) and WORK/KIND/images; `predict MODEL IMAGES OUT float16|float32` what nnU-Net makes of each image, step by step.
With float32 its accumulators and blend weights are of that type, and not float16 as in nnU-Net.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

ISO_KERNELS, ISO_STRIDES = [[3, 3, 3]] * 4, [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
FLAT_KERNELS, FLAT_STRIDES = [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
HIPPOCAMPUS = {"background": 0, "anterior": 1, "posterior": 2}
HEAD_NECK = {"background": 0, "brainstem": [1], "parotid glands": [3, 4], "mandible": [7]}
"""Structures, and the values that they have in the data set."""
CASES = {"hippocampus": (52, 8), "head_neck_ct": (24, 4), "trunk_ct": (1, 1)}
"""How many scans train a model and how many test it; one scan does both."""
LOW, CASCADE = "3d_lowres", "3d_cascade_fullres"


@dataclass(frozen=True)
class Kind:
    """One kind of model: data, what its plans say (axes as nnU-Net has them), and which folds it has."""

    data: str = "hippocampus"
    coarse_axis: int | None = None
    """The axis (x, y, z) of which every fourth slice is kept."""
    channels: int = 1
    masked: bool = False
    """Whether what lies outside an ellipsoid is 0, as after the skull was stripped."""
    labels: dict[str, Any] = field(default_factory=lambda: HIPPOCAMPUS)
    regions_order: tuple[int, ...] = ()
    planner: str = "ExperimentPlanner"
    adam: bool = False
    """Whether Adam trains it, which learns more in few steps, and not SGD as usual."""
    spacing: tuple[float, float, float] = (1.1, 0.9, 0.9)
    patch: tuple[int, int, int] = (24, 40, 24)
    flat: bool = False
    cascade: bool = False
    schemes: tuple[str, ...] = ()
    folds: tuple[Any, ...] = (0,)
    base: str = ""
    """The kind whose trained model this is, under plans that `variant` changes."""
    variant: str = ""


KINDS = {
    "ct": Kind(data="head_neck_ct", spacing=(4, 4, 4), patch=(32, 40, 40), labels=HEAD_NECK, adam=True),
    "anisotropic": Kind(coarse_axis=2, spacing=(5, 0.9, 0.9), patch=(8, 48, 40), flat=True),
    "transposed": Kind(coarse_axis=0, spacing=(3.3, 0.9, 0.9), patch=(12, 40, 48), flat=True),
    "residual": Kind(planner="nnUNetPlannerResEncM", adam=True),
    "folds": Kind(folds=(0, 1)),
    "regions": Kind(labels={"background": 0, "hippocampus": [1, 2], "posterior": 2}, regions_order=(1, 2), adam=True),
    "masked": Kind(masked=True, channels=2),
    "cascade": Kind(cascade=True, folds=("all",), adam=True),
    "torch": Kind(planner="nnUNetPlanner_torchres"),
    "torch_separate": Kind(base="anisotropic", variant="torch_separate"),
    "unresampled": Kind(base="folds", variant="unresampled"),
    "older": Kind(base="folds", variant="older"),
    "older_residual": Kind(base="residual", variant="older"),
    "ignore": Kind(base="folds", variant="ignore"),
    "rescale": Kind(channels=2, schemes=("RescaleTo01Normalization", "NoNormalization")),
    "many": Kind(data="trunk_ct", spacing=(4, 4, 4), patch=(32, 32, 32), labels={f"l{n}": n for n in range(1, 301)}),
}  # fmt: skip


def make(name: str, realdata: Path, work: Path, epochs: int) -> None:
    """Write model and test images of a kind."""
    kind, folder = KINDS[name], work / name
    if kind.base:
        for part in ("images", "labels", "model"):
            shutil.copytree(work / kind.base / part, folder / part)
        _vary(folder / "model", kind.variant)
        return
    for part in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{part}"] = str(folder / part)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    dataset = folder / "raw" / "Dataset001_Kind"
    training, test = _cases(kind, realdata)
    _write_dataset(kind, (training, test) if epochs else (training[-2:], test[-1:]), dataset, folder)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # noqa: PLC0415 - the peer's environment only
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    extract_fingerprints([1], num_processes=1)
    identifier = plan_experiments([1], kind.planner)
    plans_file = folder / "preprocessed" / "Dataset001_Kind" / f"{identifier}.json"
    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    _decide(kind, plans["configurations"]["3d_fullres"])
    if kind.cascade:
        _make_cascade(plans["configurations"])
    plans_file.write_text(json.dumps(plans), encoding="utf-8")
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # patches are drawn in this process
    preprocess([1], identifier, ("3d_fullres", *((LOW,) if kind.cascade else ())), (1,) * (1 + kind.cascade))
    for configuration in (LOW, CASCADE) if kind.cascade else ("3d_fullres",):
        for fold in kind.folds:
            _train(kind, identifier, configuration, fold, epochs)
    _keep(folder / "results" / "Dataset001_Kind", folder / "model", plans, dataset)


def _keep(results: Path, model: Path, plans: Any, dataset: Path) -> None:
    """Move what was trained to `model`: the one folder of weights, or the folder of both stages of a cascade."""
    trained = list(results.iterdir())
    for one in trained:
        if not (one / "plans.json").exists():  # nnU-Net writes them when training begins
            (one / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
            shutil.copy(dataset / "dataset.json", one / "dataset.json")
    (results if len(trained) > 1 else trained[0]).rename(model)


def _write_dataset(kind: Kind, cases: tuple[list[Any], list[Any]], dataset: Path, folder: Path) -> None:
    for part in (dataset / "imagesTr", dataset / "labelsTr", folder / "images", folder / "labels"):
        part.mkdir(parents=True)
    for group, images, labels in zip(
        cases, (dataset / "imagesTr", folder / "images"), (dataset / "labelsTr", folder / "labels"), strict=True
    ):
        for image, label in group:
            _write_case(kind, image, label, images, labels)
    values = dict(kind.labels)
    if kind.data != "hippocampus":
        values = {name: place for place, name in enumerate(dict.fromkeys(("background", *kind.labels)))}
    content = {
        "channel_names": {str(n): f"MR{n}" if kind.data == "hippocampus" else "CT" for n in range(kind.channels)},
        "labels": values,
        "numTraining": len(cases[0]),
        "file_ending": ".nii.gz",
    }
    content |= {"regions_class_order": list(kind.regions_order)} if kind.regions_order else {}
    (dataset / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def _cases(kind: Kind, realdata: Path) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """Return the scans, with their labels, that train a kind and that test it."""
    training, test = CASES[kind.data]
    if kind.data == "trunk_ct":
        folder = realdata / "trunk_ct_mr"
        only = [(folder / "example_ct.nii.gz", folder / "example_seg_fast_force_split.nii.gz")]
        return only, only
    if kind.data == "head_neck_ct":
        folder = realdata / "head_neck_ct"
        wanted = {"Brainstem", "RightParotid", "LeftParotid", "Mandible"}
        drawn = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        names = sorted(case["case"] for case in drawn if wanted <= set(case["structures"]))
        images = [folder / "imagesTr" / f"{name}_0000.nii.gz" for name in names]
    else:
        folder = realdata / "hippocampus_mr"
        images = sorted((folder / "imagesTr").glob("*.nii.gz"))
    pairs = [(image, folder / "labelsTr" / image.name.replace("_0000", "")) for image in images]
    return pairs[:training], pairs[training : training + test]


def _write_case(kind: Kind, image: Path, label: Path, images: Path, labels: Path) -> None:
    source, target = nibabel.load(image), nibabel.load(label)
    voxels, values = np.asarray(source.dataobj, np.float32), np.asarray(target.dataobj).astype(np.uint16)
    affine = source.affine.copy()
    if kind.data == "head_neck_ct":
        parts = [part for part in kind.labels.values() if isinstance(part, list)]
        values = sum((np.isin(values, part) * place).astype(np.uint16) for place, part in enumerate(parts, start=1))
    if kind.coarse_axis is not None:
        kept = tuple(slice(1, None, 4) if axis == kind.coarse_axis else slice(None) for axis in range(3))
        affine[:3, 3] += affine[:3, kind.coarse_axis]
        affine[:3, kind.coarse_axis] *= 4
        voxels, values = voxels[kept], values[kept]
    if kind.masked:
        i, j, k = (np.linspace(-1.05, 1.05, size) for size in voxels.shape)
        inside = i[:, None, None] ** 2 + j[:, None] ** 2 + k**2 < 1
        voxels, values = np.where(inside, voxels, 0), np.where(inside, values, 0)
    name = label.name.removesuffix(".nii.gz")
    for channel in range(kind.channels):
        mixed = voxels if channel == 0 else np.where(voxels != 0, ndimage.gaussian_filter(voxels, 1.5) - 7, 0)
        nibabel.save(nibabel.Nifti1Image(mixed.astype(np.float32), affine), images / f"{name}_{channel:04}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(values.astype(np.uint16), affine), labels / f"{name}.nii.gz")


def _decide(kind: Kind, configuration: dict[str, Any]) -> None:
    """Set what would make a small plan of nnU-Net's own."""
    kernels, strides = (FLAT_KERNELS, FLAT_STRIDES) if kind.flat else (ISO_KERNELS, ISO_STRIDES)
    stages = len(kernels)
    configuration |= {"spacing": list(kind.spacing), "patch_size": list(kind.patch), "batch_size": 2}
    if kind.schemes:
        configuration |= {"normalization_schemes": list(kind.schemes), "use_mask_for_norm": [False] * kind.channels}
    if kind.masked:
        configuration["use_mask_for_norm"] = [True] * kind.channels
    kwargs = configuration["architecture"]["arch_kwargs"]
    features = [8, 16, 16, 16] if kind.data == "trunk_ct" else [8, 16, 32, 32][:stages]
    kwargs |= {"n_stages": stages, "features_per_stage": features, "kernel_sizes": kernels, "strides": strides}
    if "n_blocks_per_stage" in kwargs:
        kwargs |= {"n_blocks_per_stage": [1, 3, 2, 2][:stages], "n_conv_per_stage_decoder": [1] * (stages - 1)}
    else:  # one convolution alone at the finest level, which takes most of the time
        kwargs |= {"n_conv_per_stage": [1, 2, 2, 2][:stages], "n_conv_per_stage_decoder": [2, 2, 1][-stages + 1 :]}


def _make_cascade(configurations: dict[str, Any]) -> None:
    """Write a first stage with coarser voxels, and a second one that also sees what the first has found."""
    full = configurations["3d_fullres"]
    low = {"spacing": [1.6, 1.5, 1.5], "data_identifier": f"nnUNetPlans_{LOW}", "next_stage": CASCADE}
    configurations[LOW] = json.loads(json.dumps(full)) | low
    configurations[CASCADE] = {"inherits_from": "3d_fullres", "previous_stage": LOW}


def _train(kind: Kind, identifier: str, configuration: str, fold: Any, epochs: int) -> None:
    import torch  # noqa: PLC0415
    from nnunetv2.run.run_training import get_trainer_from_args  # noqa: PLC0415
    from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import (  # noqa: PLC0415
        nnUNetTrainerAdam,
    )

    torch.manual_seed(5)
    trainer = get_trainer_from_args("1", configuration, fold, "nnUNetTrainer", identifier, device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs or 1, 50, 2
    if kind.adam:
        trainer.initial_lr, trainer.configure_optimizers = (
            1e-3,
            partial(nnUNetTrainerAdam.configure_optimizers, trainer),
        )
    if epochs:
        trainer.run_training()
        if configuration == LOW:
            trainer.perform_actual_validation()  # writes what the second stage sees
        return
    trainer.initialize()
    with torch.no_grad():  # all axes may be flipped, and normalizations are no longer 1 and 0
        for parameter in trainer.network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))


def _vary(model: Path, variant: str) -> None:
    plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
    dataset = json.loads((model / "dataset.json").read_text(encoding="utf-8"))
    configuration = plans["configurations"]["3d_fullres"]
    if variant == "ignore":
        dataset["labels"]["ignore"] = max(dataset["labels"].values()) + 1
    elif variant == "older":
        _make_older(configuration)
        plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")
        dataset["modality"] = dataset.pop("channel_names")
    else:
        for part in ("data", "seg", "probabilities"):
            function = "no_resampling_hack" if variant == "unresampled" else "resample_torch_fornnunet"
            kwargs = {"is_seg": part == "seg", "force_separate_z": None, "memefficient_seg_resampling": False}
            configuration[f"resampling_fn_{part}"] = function
            configuration[f"resampling_fn_{part}_kwargs"] = {} if variant == "unresampled" else kwargs
    (model / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    (model / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")


def _make_older(configuration: dict[str, Any]) -> None:
    """Write the network as plans did before nnU-Net 2.3."""
    architecture = configuration.pop("architecture")
    kwargs = architecture["arch_kwargs"]
    configuration |= {
        "UNet_class_name": architecture["network_class_name"].split(".")[-1],
        "UNet_base_num_features": kwargs["features_per_stage"][0],
        "unet_max_num_features": max(kwargs["features_per_stage"]),
        "n_conv_per_stage_encoder": kwargs.get("n_conv_per_stage") or kwargs["n_blocks_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [3, 3, 3],
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }


def predict(model: Path, images: Path, out: Path, accumulate: str) -> None:
    """Write NAME.npz (prepared image, logits, margin of the best exported score) and NAME.nii.gz (labels)."""
    import torch  # noqa: PLC0415
    from nnunetv2.inference import predict_from_raw_data as inference  # noqa: PLC0415

    if accumulate == "float32":
        torch.half = torch.float32
        inference.compute_gaussian = partial(inference.compute_gaussian, dtype=torch.float32)
    stages = [next(model.glob(f"*__{name}")) for name in (LOW, CASCADE)] if not (model / "plans.json").exists() else []
    if stages:
        _predict(inference, stages[0], images, out / LOW, None)
    _predict(inference, stages[-1] if stages else model, images, out, out / LOW if stages else None)


def _predict(inference: Any, model: Path, images: Path, out: Path, previous: Path | None) -> None:
    """Run one stage; `previous` has the labels of the stage before."""
    import torch  # noqa: PLC0415
    from nnunetv2.inference.export_prediction import (  # noqa: PLC0415
        convert_predicted_logits_to_segmentation_with_correct_shape,
    )
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot  # noqa: PLC0415

    predictor = inference.nnUNetPredictor(
        use_mirroring="mirror" in sys.argv, device=torch.device("cpu"), allow_tqdm=False
    )
    folds = "all" if (model / "fold_all").is_dir() else None
    predictor.initialize_from_trained_model_folder(str(model), folds)
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    preprocessor = configuration.preprocessor_class()
    out.mkdir(parents=True, exist_ok=True)
    for name in sorted({file.name.removesuffix(".nii.gz")[:-5] for file in images.iterdir()}):
        files = sorted(str(file) for file in images.glob(f"{name}_*.nii.gz"))
        before = str(previous / f"{name}.nii.gz") if previous else None
        data, seg, properties = preprocessor.run_case(files, before, plans, configuration, predictor.dataset_json)
        if previous:
            found = convert_labelmap_to_one_hot(seg[0], predictor.label_manager.foreground_labels, data.dtype)
            data = np.vstack((data, found))
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        export = (plans, configuration, predictor.label_manager, properties)
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(logits, *export)
        margin, largest = _margin(logits, *export)
        np.savez(
            out / f"{name}.npz", data=data, logits=logits.float().numpy(), margin=margin, largest=largest,
            transpose=plans.transpose_forward, spacing=configuration.spacing,
        )  # fmt: skip
        plans.image_reader_writer_class().write_seg(labels, str(out / f"{name}.nii.gz"), properties)


def _margin(logits: Any, plans: Any, configuration: Any, manager: Any, properties: dict[str, Any]) -> tuple[Any, Any]:
    """Return, where nnU-Net decides labels, by how much, and the largest score; axes (x, y, z), 0 beyond its crop."""
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    scores = np.asarray(configuration.resampling_fn_probabilities(logits, shape, configuration.spacing, spacing))
    scores = scores.astype(np.float32)
    ranked = np.sort(scores, axis=0)
    margin = np.abs(scores).min(axis=0) if manager.has_regions else ranked[-1] - ranked[-2]
    largest = np.abs(scores).max(axis=0)
    result = []
    for part in (margin, largest):
        whole = np.zeros(properties["shape_before_cropping"], np.float32)
        whole[tuple(slice(*edges) for edges in properties["bbox_used_for_cropping"])] = part
        result.append(whole.transpose(plans.transpose_backward).transpose(2, 1, 0))
    return result[0], result[1]


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    else:
        predict(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
