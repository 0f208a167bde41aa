"""A medseg model folder with random weights whose label map looks like organs, not like noise.

A U-Net with plain random weights labels voxel by voxel at random, and no export meets such maps in practice. Here the
convolutions are random mixes of channels under a smooth kernel (the encoder's with some roughness), skips count for
little, and the last layer divides the features that the network really gives on a scan into cells around a random
choice of them (the argmax of linear functions is a Voronoi diagram). Background wins most of the scan. A network so
made costs what any of its shape costs.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import torch
from phantom_ct import TRUNK
from torch import Tensor, nn

from medseg.labels import make_labels
from medseg.model.plan import Channel, Plan
from medseg.model.preprocess import prepare
from medseg.model.weights import save_weights
from medseg.networks.build import build_network
from medseg.networks.kinds import Network
from medseg.process.normalize import CTNormalization
from medseg.volume import Grid, Volume

SPACING_MM = 1.5
LEVELS = 5
MOST_FEATURES = 320

SKIP_SHARE = 0.1
"""Weight of a skip beside the features from below: how much fine texture borders have."""

ROUGHNESS = 0.3
"""Weight of rough beside smooth kernels in the encoder; smooth ones alone would make all channels alike."""

LAST_SHIFT = 1.5
"""Bias of the last normalization: most features stay above 0, where a leaky ReLU keeps all their directions."""

BACKGROUND_SHARE = 0.75
"""Share of the scan's middle that is background; 70 % in a TotalSegmentator map of the whole trunk with its air."""

LARGEST_LOGIT = 30.0
FITTED_VOXELS = 20000

ABDOMEN = CTNormalization(lower=-958, upper=327, mean=83, std=137)
"""What nnU-Net's fingerprint gives for abdominal organs; air lies below `lower`."""


def write_model(folder: Path, realdata: Path, classes: int, features: int, patch: int, *, seed: int) -> None:
    """Write plan.json and fold_0.safetensors of a model with `classes` outputs, background among them."""
    widths = tuple(min(features * 2**level, MOST_FEATURES) for level in range(LEVELS))
    strides = ((1, 1, 1), *(((2, 2, 2),) * (LEVELS - 1)))
    plan = Plan(
        name=f"random{features}",
        channels=(Channel(name="CT", normalization=ABDOMEN),),
        labels=make_labels([(value, f"organ {value}") for value in range(1, classes)]),
        spacing_mm=(SPACING_MM,) * 3,
        patch=(patch,) * 3,
        network=Network(features=widths, kernels=((3, 3, 3),) * LEVELS, strides=strides, heads=0),
    )
    network = random_network(plan, _middle(realdata, plan), seed)
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    save_weights(network, folder / "fold_0.safetensors")


def random_network(plan: Plan, scan: Tensor, seed: int) -> nn.Module:
    """Return the plan's network, its last layer fitted to the features that it gives on `scan` (1, 1, I, J, K)."""
    random = torch.Generator().manual_seed(seed)
    network = build_network(plan.network, len(plan.channels), plan.outputs).eval()
    for name, weight in network.named_parameters():
        if weight.ndim == 5 and not name.startswith("outputs."):
            weight.data = _random_kernels(name, weight.shape, random)
        elif name == f"decoder.{LEVELS - 2}.1.norm.bias":
            weight.data.fill_(LAST_SHIFT)
    last = network.get_submodule("outputs.0")
    features: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.inference_mode():
        network(scan)
    hook.remove()
    weight, bias = _voronoi(features[0][0].flatten(1).T, plan.outputs, random)
    last.load_state_dict({"weight": weight[:, :, None, None, None], "bias": bias})
    return network


def _middle(realdata: Path, plan: Plan) -> Tensor:
    """Return one normalized patch from the middle of the real scan."""
    trunk = nibabel.load(realdata / TRUNK)
    half = np.ceil(np.asarray(plan.patch) * SPACING_MM / np.asarray(trunk.header.get_zooms()) / 2).astype(int)
    middle = np.asarray(trunk.shape) // 2
    part = tuple(slice(max(0, m - h), m + h) for m, h in zip(middle, half, strict=True))
    voxels = np.asarray(trunk.dataobj, dtype=np.float32)[part]
    volume = Volume(voxels[None], Grid(voxels.shape, np.diag([*trunk.header.get_zooms(), 1.0])))
    prepared = prepare(volume, plan).array[:, : plan.patch[0], : plan.patch[1], : plan.patch[2]]
    return torch.from_numpy(np.ascontiguousarray(prepared))[None]


def _random_kernels(name: str, shape: torch.Size, random: torch.Generator) -> Tensor:
    mix = torch.randn(shape[:2], generator=random)
    if name.startswith("up."):  # one kernel value: a step of 2 voxels shows no checkerboard
        return (mix * shape[0] ** -0.5)[:, :, None, None, None].expand(shape).clone()
    if (
        name.startswith("decoder.") and ".0.conv." in name
    ):  # its inputs are the features from below, then those of the skip
        mix[:, shape[1] // 2 :] *= SKIP_SHARE
    line = torch.tensor([0.25, 0.5, 0.25])
    smooth = (mix * (2 / shape[1]) ** 0.5)[:, :, None, None, None] * (line[:, None, None] * line[:, None] * line)
    if name.startswith("decoder."):
        return smooth
    return smooth + ROUGHNESS * torch.randn(shape, generator=random) * (2 / (shape[1] * 27)) ** 0.5


def _voronoi(features: Tensor, classes: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return weight (classes, F) and bias (classes) of a linear layer; class 0 wins BACKGROUND_SHARE of `features`."""
    picked = torch.randperm(len(features), generator=random)[: classes + FITTED_VOXELS]
    centers, rest = features[picked[:classes]], features[picked[classes:]]
    weight = centers @ torch.linalg.inv(torch.cov(rest.T))
    bias = -(weight * centers).sum(dim=1) / 2
    scores = rest @ weight.T + bias
    bias[0] += torch.quantile(scores[:, 1:].amax(dim=1) - scores[:, 0], BACKGROUND_SHARE)
    weight, bias = weight - weight.mean(dim=0), bias - bias.mean()
    gain = LARGEST_LOGIT / (rest @ weight.T + bias).abs().max()
    return gain * weight, gain * bias
