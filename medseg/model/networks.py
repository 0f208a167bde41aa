"""Networks, built from the numbers in a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medseg.model.plan import Network

if TYPE_CHECKING:
    from torch import nn


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
    return unet
