"""TransUNet: a U-Net whose coarsest features look at each other from edge to edge.

Sources: Chen et al., "TransUNet", 2021; Chen et al., "TransUNet" (3D), Medical Image Analysis 2024.
"""

from __future__ import annotations

from medseg.networks.attention import TransformerBlock
from medseg.networks.kinds import TransUNetNumbers
from medseg.networks.unet import UNet


class TransUNet(UNet):
    """The U-Net with transformer blocks behind the last stage of its encoder."""

    def __init__(self, plan: TransUNetNumbers, inputs: int, outputs: int):
        super().__init__(plan.unet, inputs, outputs)
        width, kernel = plan.unet.features[-1], plan.unet.kernels[-1]
        self.encoder[-1].extend(  # type: ignore[operator]
            TransformerBlock(width, plan.attention_heads, plan.mlp_ratio * width, kernel) for _ in range(plan.layers)
        )
