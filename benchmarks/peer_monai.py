"""MONAI as a peer, `peer_monai.py MODEL IN OUT`: its transforms, its sliding window and its way back, as bundles do.

Reads a medseg model folder, but runs no medseg code: the network is MONAI's DynUNet as it comes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.data import decollate_batch
from monai.inferers import sliding_window_inference
from monai.networks.nets.dynunet import DynUNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)
from safetensors.torch import load_file


def main() -> None:
    """Segment one file."""
    model, source, target = (Path(argument) for argument in sys.argv[1:])
    plan = json.loads((model / "plan.json").read_text(encoding="utf-8"))
    network = _network(plan)
    levels = len(plan["network"]["features"])
    state = {_name(name, levels): tensor for name, tensor in load_file(model / "fold_0.safetensors").items()}
    network.load_state_dict(state, strict=False)
    scheme = plan["channels"][0]["normalization"]
    low, high = ((scheme[end] - scheme["mean"]) / scheme["std"] for end in ("lower", "upper"))
    before = Compose([
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=plan["spacing_mm"], mode="bilinear"),
        ScaleIntensityRanged("image", scheme["lower"], scheme["upper"], low, high, clip=True),
    ])  # fmt: skip
    back = Invertd("pred", transform=before, orig_keys="image", nearest_interp=False)
    data = before({"image": str(source)})
    with torch.inference_mode():
        data["pred"] = decollate_batch(
            sliding_window_inference(data["image"][None], plan["patch"], 1, network, overlap=0.5, mode="gaussian")
        )[0]
        labels = back(data)["pred"].argmax(dim=0)
    affine = nibabel.load(source).affine
    nibabel.save(nibabel.Nifti1Image(np.asarray(labels, dtype=np.uint8), affine), target)


def _network(plan: dict) -> DynUNet:
    shape = plan["network"]
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=len(plan["labels"]) + 1,
        kernel_size=shape["kernels"],
        strides=shape["strides"],
        upsample_kernel_size=shape["strides"][1:],
        filters=shape["features"],
        trans_bias=True,
    ).eval()


def _name(name: str, levels: int) -> str:
    """Return what DynUNet calls a tensor of medseg's U-Net."""
    room, place, *rest = name.split(".")
    if room == "outputs":
        return f"output_block.conv.conv.{rest[0]}"
    if room == "up":
        return f"upsamples.{place}.transp_conv.conv.{rest[0]}"
    layer = f"{rest[1]}{int(rest[0]) + 1}" + (".conv" if rest[1] == "conv" else "") + f".{rest[2]}"
    if room == "decoder":
        return f"upsamples.{place}.conv_block.{layer}"
    stages = {0: "input_block", levels - 1: "bottleneck"}
    return f"{stages.get(int(place), f'downsamples.{int(place) - 1}')}.{layer}"


if __name__ == "__main__":
    main()
