"""Networks, built from the numbers in a plan."""

from __future__ import annotations

import torch
from torch import nn

from medseg.model.plan import Network


def build_network(network: Network, inputs: int, outputs: int) -> nn.Module:
    """Return an untrained U-Net that takes (B, inputs, I, J, K) to logits (B, outputs, I, J, K).

    Instance normalization, leaky ReLU and transposed convolutions as in nnU-Net (Isensee et al., Nature Methods 2021),
    built as MONAI's DynUNet. In training mode with heads it returns (B, 1 + heads, outputs, I, J, K), the finest first.
    """
    from monai.networks.nets.dynunet import DynUNet

    unet: nn.Module = DynUNet(
        spatial_dims=3,
        in_channels=inputs,
        out_channels=outputs,
        kernel_size=network.kernels,
        strides=network.strides,
        upsample_kernel_size=network.strides[1:],
        filters=network.features,
        deep_supervision=network.heads > 0,
        deep_supr_num=max(1, network.heads),
        trans_bias=True,
    )
    _per_channel_groups(unet)
    return unet


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on a device, in the layout that is fastest there."""
    return network.to(device).to(memory_format=memory_format(device))  # type: ignore[call-overload, no-any-return]


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout of images and weights that convolutions are fastest in: channels last on a CPU."""
    return torch.channels_last_3d if device.type == "cpu" else torch.contiguous_format


def _per_channel_groups(network: nn.Module) -> None:
    """Replace instance normalization by groups of one channel: the same numbers, but it keeps channels last.

    torch's InstanceNorm3d turns its input back into contiguous memory, and every convolution after it turns it again.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm3d):
                setattr(module, name, nn.GroupNorm(child.num_features, child.num_features, eps=child.eps))
