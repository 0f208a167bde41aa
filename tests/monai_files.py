"""MONAI bundles small enough for a test, and MONAI's own workflow over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy import ndimage

from medseg.volume import Grid

NETWORKS: dict[str, dict[str, Any]] = {
    "UNet": {
        "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 8],
        "strides": [2, [2, 2, 1]], "num_res_units": 1, "norm": "batch",
    },
    "SegResNet": {
        "_target_": "monai.networks.nets.SegResNet", "in_channels": 1, "out_channels": 3, "init_filters": 8,
        "blocks_down": [1, 1, 1], "blocks_up": [1, 1], "dropout_prob": 0.2,
    },
    "DynUNet": {
        "_target_": "monai.networks.nets.dynunet.DynUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3,
        "kernel_size": [3, [3, 3, 1], 3], "strides": [1, 2, [2, 2, 1]], "upsample_kernel_size": [2, [2, 2, 1]],
        "filters": [4, 8, 8], "deep_supervision": True, "norm_name": ["INSTANCE", {"affine": True}],
    },
    "SwinUNETR": {
        "_target_": "SwinUNETR", "img_size": [32, 32, 32], "in_channels": 1, "out_channels": 3, "feature_size": 12,
        "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "use_v2": True,
    },
}  # fmt: skip


def network_def(kind: str = "UNet", **changes: Any) -> dict[str, Any]:
    return NETWORKS[kind] | changes


def transform(name: str, **keywords: Any) -> dict[str, Any]:
    return {"_target_": name, "keys": "image", **keywords}


LOAD = [transform("LoadImaged"), transform("EnsureChannelFirstd")]
TURN = transform("Orientationd", axcodes="RAS")
SPACE = transform("Spacingd", pixdim=[1.3, 1.1, 2.1], mode="bilinear")
SCALE = transform("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0.0, b_max=1.0, clip=True)


def behind(*, nearest: bool = False, sigmoid: bool = False, discrete_first: bool = False) -> list[dict[str, Any]]:
    """Return the transforms behind a network."""
    activation = transform("Activationsd", **{"sigmoid" if sigmoid else "softmax": True}) | {"keys": "pred"}
    invert = {
        "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
        "nearest_interp": nearest, "to_tensor": True,
    }  # fmt: skip
    discrete = transform("AsDiscreted", **({"threshold": 0.5} if sigmoid else {"argmax": True})) | {"keys": "pred"}
    return [activation, *([discrete, invert] if discrete_first else [invert, discrete])]


def inference(**changes: Any) -> dict[str, Any]:
    """Return a configuration with what bundles have beside what is read."""
    config = {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "device": "$torch.device('cpu')",
        "roi": [16, 16, 8],
        "network_def": network_def(),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [*LOAD, TURN, SPACE, SCALE, transform("EnsureTyped", device="@device")],
        },
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": "@roi", "sw_batch_size": 2, "overlap": 0.6,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": behind()},
        "evaluator": {"_target_": "SupervisedEvaluator", "device": "@device", "inferer": "@inferer"},
    }  # fmt: skip
    return config | changes


def metadata(outputs: dict[str, str] | None = None, inputs: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "name": "Test bundle",
        "version": "0.1.0",
        "intended_use": "Tests alone",
        "copyright": "Nobody",
        "network_data_format": {
            "inputs": {"image": {"channel_def": inputs or {"0": "CT"}}},
            "outputs": {"pred": {"channel_def": outputs or {"0": "background", "1": "liver", "2": "spleen"}}},
        },
    }


def parsed(config: dict[str, Any], key: str) -> Any:
    """Return what MONAI makes of a part of a configuration."""
    from monai.bundle import ConfigParser

    known = json.loads(json.dumps({name: part for name, part in config.items() if name != "evaluator"}))
    known["network_def"].pop("img_size", None)
    return ConfigParser(known).get_parsed_content(key)


def write_bundle(folder: Path, config: dict[str, Any], meta: dict[str, Any] | None = None, *, key: str | None = None):
    """Write a bundle with random weights and return its network."""
    torch.manual_seed(3)
    network = parsed(config, "network_def").eval()
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "configs/inference.json").write_text(json.dumps(config))
    (folder / "configs/metadata.json").write_text(json.dumps(metadata() if meta is None else meta))
    state = network.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, folder / "models/model.pt")
    return network


def write_scan(path: Path, grid: Grid, seed: int = 5) -> None:
    """Write a smooth scan of about the range of a soft-tissue window."""
    voxels = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 1, grid.shape), 2, mode="wrap")
    nibabel.save(nibabel.Nifti1Image((50 + 90 * voxels / voxels.std()).astype(np.float32), grid.affine), path)


def run_monai(config: dict[str, Any], network: torch.nn.Module, scans: Path | list[Path]) -> np.ndarray:
    """Return what MONAI's own workflow finds: (outputs, I, J, K), on the grid of the scan."""
    data = parsed(config, "preprocessing")({"image": scans})
    with torch.inference_mode():
        data["pred"] = parsed(config, "inferer")(data["image"][None], network)[0]
    # Invertd looks for what the preprocessing itself did, so both come from one configuration.
    from monai.bundle import ConfigParser

    known = json.loads(json.dumps({name: part for name, part in config.items() if name != "evaluator"}))
    parser = ConfigParser(known)
    data = parser.get_parsed_content("preprocessing")({"image": scans}) | {"pred": data["pred"]}
    return parser.get_parsed_content("postprocessing")(data)["pred"].numpy()
