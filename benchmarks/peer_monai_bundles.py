"""MONAI bundles of several network kinds, written and trained by MONAI itself on real images.

Needs MONAI, pytorch-ignite and fire. `make KIND REALDATA FOLDER STEPS` writes FOLDER/bundle, and scans that it was not
trained on as FOLDER/images and FOLDER/labels. `python -m monai.bundle run` runs such a bundle.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

TRAINING_CASES, TEST_CASES, BATCH = 40, 8, 2
ENDS = {"spatial_dims": 3, "in_channels": 1}


def transform(name: str, **keywords: Any) -> dict[str, Any]:
    """Return the description of a transform of the image."""
    return {"_target_": name, "keys": "@image_key", **keywords}


def behind(*steps: dict[str, Any]) -> list[dict[str, Any]]:
    """Return transforms of the prediction."""
    return [{**step, "keys": "pred"} for step in steps]


NONZERO = transform("NormalizeIntensityd", nonzero=True)
SCALE = transform("ScaleIntensityd", minv=-1.0, maxv=1.0)
SOFTMAX, SIGMOID = transform("Activationsd", softmax=True), transform("Activationsd", sigmoid=True)
ARGMAX, HALF = transform("AsDiscreted", argmax=True), transform("AsDiscreted", threshold=0.5)
LINEAR = transform(
    "Invertd", transform="@preprocessing", orig_keys="@image_key", nearest_interp=False, to_tensor=True, device="cpu"
)
NEAREST = LINEAR | {"nearest_interp": True}

KINDS: dict[str, dict[str, Any]] = {
    "unet": {
        "network_def": {
            "_target_": "UNet", **ENDS, "out_channels": 3, "channels": [8, 16, 32, 64], "strides": [2, 2, 2],
            "num_res_units": 2, "norm": "batch",
        },
        "scaling": [NONZERO],
        "inferer": {"roi_size": [32, 48, 32], "overlap": 0.5, "mode": "gaussian"},
        "behind": behind(SOFTMAX, LINEAR, ARGMAX),
    },
    "segresnet": {
        "network_def": {
            "_target_": "SegResNet", **ENDS, "out_channels": 3, "init_filters": 8, "blocks_down": [1, 2, 2],
            "blocks_up": [1, 1], "dropout_prob": 0.2,
        },
        "scaling": [NONZERO, SCALE],
        "inferer": {"roi_size": [32, 32, 32], "overlap": 0.25, "mode": "gaussian", "padding_mode": "replicate"},
        "behind": behind(SOFTMAX, ARGMAX, NEAREST),
    },
    "dynunet": {
        "network_def": {
            "_target_": "monai.networks.nets.DynUNet", **ENDS, "out_channels": 2, "kernel_size": [3, 3, 3, 3],
            "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2], "filters": [8, 16, 32, 32],
            "norm_name": "instance", "res_block": True,
        },
        "scaling": [transform("ScaleIntensityRanged", a_min=0, a_max=500, b_min=0.0, b_max=1.0, clip=True), NONZERO],
        "inferer": {"roi_size": [32, 32, 32], "overlap": 0.5},
        "behind": behind(SIGMOID, LINEAR, HALF),
    },
    "swinunetr": {
        "network_def": {
            "_target_": "SwinUNETR", **ENDS, "out_channels": 3, "feature_size": 12, "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
        },
        "scaling": [NONZERO],
        "inferer": {"roi_size": [32, 64, 32], "overlap": 0.5},
        "behind": behind(SOFTMAX, LINEAR, ARGMAX),
    },
}  # fmt: skip
"""What differs between the kinds: with two outputs they overlap, the whole hippocampus and its posterior part."""


def configuration(kind: str) -> dict[str, Any]:
    """Return inference.json, in the words of MONAI's model zoo."""
    own = KINDS[kind]
    saving = {name: f"@{name}" for name in ("output_dir", "output_ext", "output_dtype", "output_postfix")}
    return {
        "imports": ["$import glob", "$import numpy"],
        "bundle_root": ".",
        "image_key": "image",
        "highres": True,
        "pixdim": "$[0.9, 1.1, 1.0] if @highres else [2.0, 2.0, 2.0]",
        "output_dir": "$@bundle_root + '/eval'",
        "output_ext": ".nii.gz",
        "output_dtype": "$numpy.float32",
        "output_postfix": "trans",
        "dataset_dir": ".",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
        "device": "$torch.device('cpu')",
        "network_def": own["network_def"],
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                transform("LoadImaged"),
                transform("EnsureChannelFirstd"),
                transform("Orientationd", axcodes="RAS"),
                transform("Spacingd", pixdim="@pixdim", mode="bilinear"),
                *own["scaling"],
                transform("EnsureTyped", device="@device"),
            ],
        },
        "dataset": {
            "_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False},
        "inferer": {"_target_": "SlidingWindowInferer", "sw_batch_size": 4, **own["inferer"]},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                *own["behind"],
                {**transform("SaveImaged", separate_folder=False, **saving), "keys": "pred"},
            ],
        },
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing",
            "val_handlers": "@handlers", "amp": False,
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "initialize": ["$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def make(kind: str, realdata: Path, folder: Path, steps: int) -> None:
    """Write the bundle of a kind, and what tests it."""
    data = realdata / "hippocampus_mr"
    scans = sorted((data / "imagesTr").glob("*.nii.gz"))[: TRAINING_CASES + TEST_CASES]
    for part, source in (("images", "imagesTr"), ("labels", "labelsTr")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for scan in scans[TRAINING_CASES:]:
            shutil.copy(data / source / scan.name, folder / part)
    for part in ("configs", "models"):
        (folder / "bundle" / part).mkdir(parents=True, exist_ok=True)
    config = configuration(kind)
    regions = config["network_def"]["out_channels"] == 2
    names = ["hippocampus", "posterior"] if regions else ["background", "anterior", "posterior"]
    form = {
        "inputs": {"image": {"channel_def": {"0": "MR"}}},
        "outputs": {"pred": {"channel_def": {str(place): name for place, name in enumerate(names)}}},
    }
    metadata = {"name": f"hippocampus, {kind}", "version": "0.1.0", "network_data_format": form}
    for name, content in (("inference", config), ("metadata", metadata)):
        text = json.dumps(content, indent=1)
        (folder / "bundle" / "configs" / f"{name}.json").write_text(text, encoding="utf-8")
    pairs = [{"image": str(scan), "label": str(data / "labelsTr" / scan.name)} for scan in scans[:TRAINING_CASES]]
    network = _trained(config, pairs, steps, regions=regions)
    torch.save({"model": network.state_dict()}, folder / "bundle" / "models" / "model.pt")


def _trained(config: dict[str, Any], pairs: list[dict[str, str]], steps: int, *, regions: bool) -> torch.nn.Module:
    """Return the network after so many steps on random patches."""
    from monai import transforms  # noqa: PLC0415
    from monai.bundle import ConfigParser  # noqa: PLC0415
    from monai.data import CacheDataset, DataLoader  # noqa: PLC0415
    from monai.losses import DiceCELoss  # noqa: PLC0415
    from monai.utils import set_determinism  # noqa: PLC0415

    set_determinism(5)
    parser = ConfigParser(config)
    network, size = parser.get_parsed_content("network_def"), config["inferer"]["roi_size"]
    both = ["image", "label"]
    steps_before = [
        transforms.LoadImaged(both), transforms.EnsureChannelFirstd(both), transforms.Orientationd(both, axcodes="RAS"),
        transforms.Spacingd(both, pixdim=parser.get_parsed_content("pixdim"), mode=["bilinear", "nearest"]),
        *(parser.get_parsed_content(f"preprocessing#transforms#{4 + place}")
          for place in range(len(config["preprocessing"]["transforms"]) - 5)),
        transforms.SpatialPadd(both, spatial_size=size), transforms.RandSpatialCropd(both, roi_size=size),
        transforms.RandScaleIntensityd("image", factors=0.1, prob=0.5),
    ]  # fmt: skip
    dataset = CacheDataset(pairs, transforms.Compose(steps_before), progress=False)
    loss = DiceCELoss(sigmoid=regions, softmax=not regions, to_onehot_y=not regions)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    done = 0
    while done < steps:
        for batch in DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True):
            label = batch["label"]
            target = torch.cat([label > 0, label == 2], dim=1).float() if regions else label
            optimizer.zero_grad()
            value = loss(network(batch["image"]), target)
            value.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % 50 == 0 or done == steps:
                print(done, float(value), flush=True)
            if done == steps:
                break
    return network.eval()


if __name__ == "__main__":
    np.seterr(all="ignore")
    make(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
