"""Networks of MONAI in the words of a plan: the numbers that each kind is built from, and nothing that names a class.

The fields are those of MONAI's own networks (`monai.networks.nets`), without the channels that go in and out.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=64)]
Depth = Annotated[int, Field(ge=1, le=24)]
Window = Annotated[int, Field(ge=1, le=10)]
"""A table of each block of SwinUNETR grows with the sixth power of this, and is not among the weights."""

Width = Annotated[int, Field(ge=1, le=4096)]
Sizes = Size | tuple[Size, Size, Size]
Share = Annotated[float, Field(ge=0, lt=1)]
Layer = Annotated[str, Field(pattern="^[A-Za-z]{1,20}$")]
Named = Layer | tuple[Layer, dict[str, bool | int | float]]
"""A layer by MONAI's name for it ("PRELU"), and maybe its settings."""

Triple = tuple[Count, Count, Count]


class _Kind(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided; a network adds zeros behind a patch that cannot be."""
        return 1, 1, 1


class MonaiUNet(_Kind):
    """MONAI's UNet: channels of each resolution from the finest down, and the strides between them."""

    kind: Literal["monai_unet"] = "monai_unet"
    channels: tuple[Width, ...] = Field(min_length=2, max_length=10)
    strides: tuple[Sizes, ...] = Field(max_length=9)
    kernel_size: Sizes = 3
    up_kernel_size: Sizes = 3
    num_res_units: int = Field(default=0, ge=0, le=64)
    act: Named = "PRELU"
    norm: Named = "INSTANCE"
    dropout: Share = 0.0
    bias: bool = True
    adn_ordering: str = Field(default="NDA", pattern="^[NDA]{1,3}$")

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided: the product of the strides along it."""
        return _product(self.strides)


class MonaiSegResNet(_Kind):
    """MONAI's SegResNet: residual blocks of each resolution, which halves with each."""

    kind: Literal["monai_segresnet"] = "monai_segresnet"
    init_filters: Width = 8
    dropout_prob: Share | None = None
    act: Named = ("RELU", {"inplace": True})
    norm: Named = ("GROUP", {"num_groups": 8})
    use_conv_final: bool = True
    blocks_down: tuple[Size, ...] = Field(default=(1, 2, 2, 4), min_length=1, max_length=8)
    blocks_up: tuple[Size, ...] = Field(default=(1, 1, 1), max_length=7)
    upsample_mode: Literal["deconv", "nontrainable", "pixelshuffle"] = "nontrainable"

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided; a network adds zeros behind a patch that cannot be."""
        return (2 ** (len(self.blocks_down) - 1),) * 3


class MonaiDynUNet(_Kind):
    """MONAI's DynUNet: kernels and strides of each resolution from the finest down."""

    kind: Literal["monai_dynunet"] = "monai_dynunet"
    kernel_size: tuple[Sizes, ...] = Field(min_length=3, max_length=10)
    strides: tuple[Sizes, ...] = Field(min_length=3, max_length=10)
    upsample_kernel_size: tuple[Sizes, ...] = Field(min_length=2, max_length=9)
    filters: tuple[Width, ...] | None = None
    dropout: Share | None = None
    norm_name: Named = ("INSTANCE", {"affine": True})
    act_name: Named = ("leakyrelu", {"inplace": True, "negative_slope": 0.01})
    deep_supervision: bool = False
    deep_supr_num: int = Field(default=1, ge=1, le=8)
    res_block: bool = False
    trans_bias: bool = False

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided: the product of the strides along it."""
        return _product(self.strides)


class MonaiSwinUNETR(_Kind):
    """MONAI's SwinUNETR: depth and attention heads of its four stages. It needs the package einops."""

    kind: Literal["monai_swinunetr"] = "monai_swinunetr"
    patch_size: Literal[2] = 2
    depths: tuple[Depth, Depth, Depth, Depth] = (2, 2, 2, 2)
    num_heads: tuple[Size, Size, Size, Size] = (3, 6, 12, 24)
    window_size: Window | tuple[Window, Window, Window] = 7
    qkv_bias: bool = True
    mlp_ratio: float = Field(default=4.0, gt=0, le=16)
    feature_size: Annotated[int, Field(ge=12, le=384, multiple_of=12)] = 24
    norm_name: Named = "instance"
    drop_rate: Share = 0.0
    attn_drop_rate: Share = 0.0
    dropout_path_rate: Share = 0.0
    normalize: bool = True
    patch_norm: bool = False
    use_checkpoint: bool = False
    downsample: Literal["merging", "mergingv2"] = "merging"
    use_v2: bool = False

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided; a network adds zeros behind a patch that cannot be."""
        return 32, 32, 32


MonaiNetwork = MonaiUNet | MonaiSegResNet | MonaiDynUNet | MonaiSwinUNETR


def _product(strides: tuple[Sizes, ...]) -> Triple:
    product = [1, 1, 1]
    for stride in strides:
        factors = (stride,) * 3 if isinstance(stride, int) else stride
        product = [a * b for a, b in zip(product, factors, strict=True)]
    return product[0], product[1], product[2]
