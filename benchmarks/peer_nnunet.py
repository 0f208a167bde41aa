"""nnU-Net v2 as a peer: a medseg model folder written as an nnU-Net one, and how nnU-Net is run.

Run as a script it needs nnU-Net's own environment: `peer_nnunet.py MODEL PATCH.npy LOGITS.npy` loads the folder with
nnUNetPredictor and writes the network's logits of one patch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

CONFIGURATION = "3d_fullres"


def command(python: Path, model: Path, images: Path, out: Path, workers: int) -> list[str]:
    """Return nnU-Net's own command: CPU, no mirroring; 0 workers run everything in one process."""
    program = str(python.with_name("nnUNetv2_predict_from_modelfolder"))
    count = str(workers)
    options = ["-f", "0", "-device", "cpu", "--disable_tta", "-step_size", "0.5", "-npp", count, "-nps", count]
    return [program, "-i", str(images), "-o", str(out), "-m", str(model), *options]


def write_model(folder: Path, plan: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Write the plan.json and weights of a medseg model (one CT channel, a U-Net) as an nnU-Net model folder.

    nnU-Net numbers axes (z, y, x) and medseg (x, y, z), so each kernel is turned; both networks are one function.
    """
    plans = _plans(plan)
    labels = {"background": 0} | {label["name"]: label["value"] for label in plan["labels"]}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    checkpoint = {
        "network_weights": _state(weights, len(plan["network"]["features"])),
        "init_args": {"plans": plans, "configuration": CONFIGURATION, "fold": 0, "dataset_json": dataset},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans, indent=1), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1), encoding="utf-8")
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


def _plans(plan: dict[str, Any]) -> dict[str, Any]:
    scheme = plan["channels"][0]["normalization"]
    intensities = {"mean": scheme["mean"], "std": scheme["std"], "median": scheme["mean"]}
    intensities |= {"min": scheme["lower"], "max": scheme["upper"]}
    intensities |= {"percentile_00_5": scheme["lower"], "percentile_99_5": scheme["upper"]}
    configuration = {
        "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": plan["patch"][::-1],
        "median_image_size_in_voxels": plan["patch"][::-1],
        "spacing": plan["spacing_mm"][::-1],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "architecture": _architecture(plan["network"]),
        "batch_dice": False,
    }
    for name, order, is_seg in (("data", 3, False), ("seg", 1, True), ("probabilities", 1, False)):
        configuration[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{name}_kwargs"] = {
            "is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None
        }  # fmt: skip
    return {
        "dataset_name": "Dataset001_Benchmark",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": plan["spacing_mm"][::-1],
        "original_median_shape_after_transp": plan["patch"][::-1],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {CONFIGURATION: configuration},
    }


def _architecture(network: dict[str, Any]) -> dict[str, Any]:
    levels = len(network["features"])
    kwargs = {
        "n_stages": levels,
        "features_per_stage": network["features"],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [kernel[::-1] for kernel in network["kernels"]],
        "strides": [stride[::-1] for stride in network["strides"]],
        "n_conv_per_stage": [2] * levels,
        "n_conv_per_stage_decoder": [2] * (levels - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _state(weights: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Return PlainConvUNet's state: each convolution stands there twice, and the encoder once more in the decoder."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        room, stage, *rest = name.split(".")
        if room == "up":
            state[f"decoder.transpconvs.{stage}.{rest[0]}"] = _turned(tensor) if tensor.ndim == 5 else tensor
        elif room == "encoder":
            for root in ("encoder", "decoder.encoder"):
                state |= _twice(f"{root}.stages.{stage}.0", rest, tensor)
        elif room == "decoder":
            state |= _twice(f"decoder.stages.{stage}", rest, tensor)
    for stage in range(levels - 1):  # the heads of lower resolutions are there and have no effect
        inputs = len(state[f"decoder.stages.{stage}.convs.0.conv.bias"])
        bias = weights["outputs.0.bias"]
        state |= {f"decoder.seg_layers.{stage}.weight": torch.zeros(len(bias), inputs, 1, 1, 1)}
        state |= {f"decoder.seg_layers.{stage}.bias": bias}
    state[f"decoder.seg_layers.{levels - 2}.weight"] = _turned(weights["outputs.0.weight"])
    return state


def _twice(stage: str, rest: list[str], tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tensor under both of its names; nnU-Net's convolutions have a bias, without effect before the norm."""
    place, part, kind = rest
    tensors = {f"{part}.{kind}": _turned(tensor) if part == "conv" else tensor}
    if part == "conv":
        tensors["conv.bias"] = torch.zeros(len(tensor))
    twins = {
        name.replace("conv.", "all_modules.0.").replace("norm.", "all_modules.1."): t for name, t in tensors.items()
    }
    return {f"{stage}.convs.{place}.{name}": value for name, value in (tensors | twins).items()}


def _turned(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(0, 1, 4, 3, 2).contiguous()


def main() -> None:
    """Write the logits of one patch, axes as medseg has them."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: PLC0415 - the peer's environment only

    model, patch, logits = sys.argv[1:]
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(model, (0,))
    image = torch.from_numpy(np.load(patch).transpose(0, 3, 2, 1).copy())[None]
    with torch.inference_mode():
        output = predictor.network.eval()(image)[0]
    np.save(logits, output.numpy().transpose(0, 3, 2, 1))


if __name__ == "__main__":
    main()
