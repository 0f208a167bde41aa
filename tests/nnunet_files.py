"""Small model folders as nnU-Net v2 writes them, and its networks in a few lines, by its own names of weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

KERNELS, STRIDES = [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
BLOCKS = [1, 2, 1]
FEATURES, PATCH, SPACING = [3, 4, 5], [4, 16, 12], [4.0, 0.9, 1.1]


def architecture(*, residual: bool = False, **changes: Any) -> dict[str, Any]:
    kwargs = {
        "n_stages": 3,
        "features_per_stage": FEATURES,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": KERNELS,
        "strides": STRIDES,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": BLOCKS if residual else [2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs | changes,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configuration(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "spacing": SPACING,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture(),
        "batch_dice": False,
    }
    for part, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        fields[f"resampling_fn_{part}"] = "resample_data_or_seg_to_shape"
        kwargs = {"is_seg": part == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        fields[f"resampling_fn_{part}_kwargs"] = kwargs
    return fields | changes


def plans(configurations: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    numbers = {"mean": 40.0, "std": 90.0, "percentile_00_5": -900.0, "percentile_99_5": 300.0, "median": 30.0}
    return {
        "dataset_name": "Dataset007_Test",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": numbers},
        "configurations": configurations or {"3d_fullres": configuration()},
    } | changes


def dataset(**changes: Any) -> dict[str, Any]:
    labels = {"background": 0, "left": 1, "right": 2}
    return {"channel_names": {"0": "T1"}, "labels": labels, "numTraining": 3, "file_ending": ".nii.gz"} | changes


def weights(seed: int = 0, *, residual: bool = False, inputs: int = 1, outputs: int = 3) -> dict[str, Tensor]:
    """Return random weights under nnU-Net's names, each convolution twice and the encoder once more."""
    random = torch.Generator().manual_seed(seed)
    state = _residual_encoder(inputs, random) if residual else _plain_encoder(inputs, random)
    state |= {f"decoder.{name}": tensor for name, tensor in state.items()}
    for stage, level in enumerate((1, 0)):
        stride, width = STRIDES[level + 1], FEATURES[level]
        up = torch.randn(FEATURES[level + 1], width, *stride, generator=random)
        state |= {f"decoder.transpconvs.{stage}.weight": up, f"decoder.transpconvs.{stage}.bias": up[0, :, 0, 0, 0]}
        for place in range(1 if residual else 2):
            widths = (1 if place else 2) * width, width
            state |= _convolution(f"decoder.stages.{stage}.convs.{place}", widths, KERNELS[level], random)
        head = torch.randn(outputs, width, 1, 1, 1, generator=random)
        state |= {f"decoder.seg_layers.{stage}.weight": head, f"decoder.seg_layers.{stage}.bias": head[:, 0, 0, 0, 0]}
    return state


def _plain_encoder(inputs: int, random: torch.Generator) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for level, (wider, kernel) in enumerate(zip(FEATURES, KERNELS, strict=True)):
        width = FEATURES[level - 1] if level else inputs
        state |= _convolution(f"encoder.stages.{level}.0.convs.0", (width, wider), kernel, random)
        state |= _convolution(f"encoder.stages.{level}.0.convs.1", (wider, wider), kernel, random)
    return state


def _residual_encoder(inputs: int, random: torch.Generator) -> dict[str, Tensor]:
    state = _convolution("encoder.stem.convs.0", (inputs, FEATURES[0]), KERNELS[0], random)
    width = FEATURES[0]
    for level, (wider, kernel) in enumerate(zip(FEATURES, KERNELS, strict=True)):
        for place in range(BLOCKS[level]):
            block = f"encoder.stages.{level}.blocks.{place}"
            state |= _convolution(f"{block}.conv1", (width, wider), kernel, random)
            state |= _convolution(f"{block}.conv2", (wider, wider), kernel, random)
            if width != wider:
                state |= _convolution(f"{block}.skip.1", (width, wider), [1, 1, 1], random, bias=False)
            width = wider
    return state


def _convolution(
    name: str, widths: tuple[int, int], kernel: list[int], random: torch.Generator, *, bias: bool = True
) -> dict[str, Tensor]:
    width, wider = widths
    tensors = {"conv.weight": torch.randn(wider, width, *kernel, generator=random) * (width * 9) ** -0.5}
    tensors |= {"conv.bias": torch.randn(wider, generator=random)} if bias else {}
    tensors |= {f"norm.{part}": 1 + 0.3 * torch.randn(wider, generator=random) for part in ("weight", "bias")}
    twins = {"conv.": "all_modules.0.", "norm.": "all_modules.1."}
    tensors |= {part.replace(part[:5], twins[part[:5]]): tensor for part, tensor in tensors.items()}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def logits(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """Return what nnU-Net's network of these weights says of an image (1, C, z, y, x)."""
    if "encoder.stem.convs.0.conv.weight" in state:
        image = _active(_convolved(state, "encoder.stem.convs.0", image))
    skips = []
    for level, stride in enumerate(STRIDES):
        for place, name in enumerate(_numbered(state, f"encoder.stages.{level}.0.convs")):
            image = _active(_convolved(state, name, image, 1 if place else stride))
        for place, name in enumerate(_numbered(state, f"encoder.stages.{level}.blocks")):
            image = _block(state, name, image, [1, 1, 1] if place else stride)
        skips.append(image)
    for stage, level in enumerate((1, 0)):
        up, bias = (state[f"decoder.transpconvs.{stage}.{part}"] for part in ("weight", "bias"))
        image = functional.conv_transpose3d(image, up, bias, STRIDES[level + 1])
        image = torch.cat([image, skips[level]], dim=1)
        for name in _numbered(state, f"decoder.stages.{stage}.convs"):
            image = _active(_convolved(state, name, image))
    return functional.conv3d(image, state["decoder.seg_layers.1.weight"], state["decoder.seg_layers.1.bias"])


def _block(state: dict[str, Tensor], name: str, image: Tensor, stride: list[int]) -> Tensor:
    skip = functional.avg_pool3d(image, stride) if max(stride) > 1 else image
    for other in _numbered(state, f"{name}.skip"):
        skip = _convolved(state, other, skip)
    inner = _active(_convolved(state, f"{name}.conv1", image, stride))
    return _active(_convolved(state, f"{name}.conv2", inner) + skip)


def _convolved(state: dict[str, Tensor], name: str, image: Tensor, stride: Any = 1) -> Tensor:
    kernel, bias = state[f"{name}.conv.weight"], state.get(f"{name}.conv.bias")
    image = functional.conv3d(image, kernel, bias, stride, [size // 2 for size in kernel.shape[2:]])
    return functional.instance_norm(image, None, None, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])


def _active(image: Tensor) -> Tensor:
    return functional.leaky_relu(image, 0.01)


def _numbered(state: dict[str, Tensor], prefix: str) -> list[str]:
    pattern = re.compile(rf"({re.escape(prefix)}\.\d+)\..*")
    return sorted({match[1] for name in state if (match := pattern.fullmatch(name))})


def checkpoint(state: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """Return what nnU-Net saves, with the numpy numbers and the device that plain loading refuses."""
    return {
        "network_weights": state,
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)], "epoch": np.int64(3)},
        "_best_ema": np.float64(0.5),
        "current_epoch": 3,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 2),
    } | changes


def write_model(
    folder: Path, *, plan: Any = None, data: Any = None, folds: tuple[Any, ...] = (0,), name: str = "final", **kind: Any
) -> Path:
    """Write a trained-model folder; `kind` is that of `weights`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plan or plans()), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(data or dataset()), encoding="utf-8")
    for seed, fold in enumerate(folds):
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(checkpoint(weights(seed, **kind)), folder / f"fold_{fold}" / f"checkpoint_{name}.pth")
    return folder
