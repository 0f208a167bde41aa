"""From the numbers in a plan to a network, and where it computes fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from medseg.networks import monai_nets
from medseg.networks.kinds import AnyNetwork
from medseg.networks.layers import initialize
from medseg.networks.segformer import SegFormer
from medseg.networks.transunet import TransUNet
from medseg.networks.unet import UNet
from medseg.networks.unet_plus_plus import UNetPlusPlus

Builder = Callable[[Any, int, int], nn.Module]
"""From the numbers of a kind, and the numbers of channels that go in and out, to a network."""

OWN: dict[str, Builder] = {"unet": UNet, "unet_plus_plus": UNetPlusPlus, "transunet": TransUNet, "segformer": SegFormer}
"""The networks of medseg by their kind; those of MONAI have kinds that begin with monai_."""


def build_network(network: AnyNetwork, inputs: int, outputs: int) -> nn.Module:
    """Return an untrained network that takes (B, inputs, I, J, K) to logits (B, outputs, I, J, K), of whatever size.

    In training mode it may return a list of logits, one for each resolution that has a head, the finest first.
    Raises ModelError where the numbers contradict each other, or a package is missing.
    """
    if network.kind in OWN:
        return OWN[network.kind](network, inputs, outputs).apply(initialize)
    return monai_nets.build(network, inputs, outputs)  # type: ignore[arg-type]


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on a device, in the layout that is fastest there."""
    return network.to(device).to(memory_format=memory_format(device))  # type: ignore[call-overload, no-any-return]


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout of images and weights that convolutions are fastest in: channels last on a CPU."""
    return torch.channels_last_3d if device.type == "cpu" else torch.contiguous_format
