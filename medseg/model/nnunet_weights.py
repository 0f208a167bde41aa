"""Weights of nnU-Net v2 under medseg's names and in medseg's order of axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from medseg.model.imported import unsupported
from medseg.model.plan import Plan

NAMES = (
    (r"encoder\.stem\.convs\.0\.(conv|norm)\.(weight|bias)", r"stem.\1.\2"),
    (r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(conv|norm)\.(weight|bias)", r"encoder.\1.\2.\3.\4"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv[12])\.(conv|norm)\.(weight|bias)", r"encoder.\1.\2.\3.\4.\5"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d\.(conv|norm)\.(weight|bias)", r"encoder.\1.\2.skip.\3.\4"),
    (r"decoder\.transpconvs\.(\d+)\.(weight|bias)", r"up.\1.\2"),
    (r"decoder\.stages\.(\d+)\.convs\.(\d+)\.(conv|norm)\.(weight|bias)", r"decoder.\1.\2.\3.\4"),
)
"""nnU-Net's names of weights, and medseg's."""


def renamed(plan: Plan) -> Callable[[str], str | None]:
    """Return what gives medseg's name for a tensor of nnU-Net's, and None for what is left out.

    Left out are tensors that are there a second time; heads of lower resolutions, which only training uses; and biases
    before a normalization, which takes them away.
    """
    last = f"decoder.seg_layers.{len(plan.unet.features) - 2}."
    unused = re.compile(r"decoder\.encoder\..*|.*\.all_modules\..*|.*\.conv\.bias|decoder\.seg_layers\..*")

    def rename(name: str) -> str | None:
        if name.startswith(last):
            return f"outputs.0.{name.removeprefix(last)}"
        if unused.fullmatch(name):
            return None
        for pattern, own in NAMES:
            match = re.fullmatch(pattern, name)
            if match:
                return match.expand(own)
        raise unsupported("weights", name[:80])

    return rename


def turned(weights: dict[str, Tensor], axes: Sequence[int]) -> dict[str, Tensor]:
    """Return weights whose kernels lie along medseg's axes, each of which is the axis of nnU-Net's in `axes`."""
    turned = {
        name: tensor.permute(0, 1, *(2 + axis for axis in axes)) if tensor.ndim == 5 else tensor
        for name, tensor in weights.items()
    }
    biases = {name.replace(".weight", ".bias"): tensor for name, tensor in turned.items() if name.startswith("up.")}
    zeros = {name: tensor.new_zeros(tensor.shape[1]) for name, tensor in biases.items() if name not in turned}
    return turned | zeros
